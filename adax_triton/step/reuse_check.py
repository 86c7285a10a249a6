"""Find out in bulk whether tensors and groups are those of an earlier step but for gradient addresses and counts."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter, ge, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch._C._dynamo import guards

from adax_triton.state.allocation import STATE_TENSORS

from .collect import ParamWithGrad

_gradient = attrgetter("grad")
_options = itemgetter("weight_rounding", "capturable")
_list_of_params = itemgetter("params")
_count = itemgetter("step")


class ReuseCheck:
    """What a step found of its parameters, to compare later steps with.

    Args:
        params: of the step, plain tensors that are stepped just as they lie.
        own_states: theirs.
        counted_there: whether a device counts the steps of each.
        param_groups: of the optimizer.
        states: of all its parameters.
        is_whole: whether these are all parameters of the groups that have a gradient.

    Attributes:
        counts: by `gradient_addresses`, of the parameters whose steps the host counts.
    """

    def __init__(
        self,
        params: Sequence[ParamWithGrad],
        own_states: Sequence[dict[str, Any]],
        counted_there: Sequence[bool],
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
        is_whole: bool,
    ) -> None:
        self._params = [one.param for one in params]
        self._is_whole = is_whole
        self._group_indices = [one.group_index for one in params]
        self._grad_counts = [len(one.grads) for one in params]
        self._images = [one.low_precision_copy for one in params if one.low_precision_copy is not None]
        self._options = list(map(_options, param_groups))
        if is_whole:
            lists = list(map(_list_of_params, param_groups))
            self._group_sizes = list(map(len, lists))
            self._all_params = list(chain.from_iterable(lists))
            self._all_keys, self._all_states = list(states), list(states.values())
            self._has_grad = [param.grad is not None for param in self._all_params]
            self._grad_types = [type(param.grad) for param in self._all_params]
        self._states = own_states
        self._state_sizes = list(map(len, own_states))
        counted_here = [not there for there in counted_there]
        self._counting = list(compress(own_states, counted_here))
        holders = {name: [state for state in own_states if name in state] for name in STATE_TENSORS}
        holders["step"] = list(compress(own_states, counted_there))
        self._holders = [(itemgetter(name), some) for name, some in holders.items() if some]
        of_states = chain.from_iterable(map(name, holders) for name, holders in self._holders)
        fixed = [*self._params, *self._images, *of_states]
        self._addresses = list(map(Tensor.data_ptr, fixed))
        gradients = list(chain.from_iterable(one.grads for one in params))
        self._guards = tensor_guards([*fixed, *gradients])
        self._grad_bytes = [grad.nbytes for grad in gradients]
        self.counts: list[Any] = []

    def gradient_addresses(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
        given: Sequence[ParamWithGrad] | None,
        known: array[int],
    ) -> array[int] | None:
        """Return where gradients lie, or None if anything but that and step counts has changed.

        Args:
            param_groups: of the optimizer.
            states: of all its parameters.
            given: the parameters of a step that is not whole.
            known: where gradients lay in the last step.
        """
        if list(map(_options, param_groups)) != self._options:
            return None
        gradients = self._whole_gradients(param_groups, states) if given is None else self._given(given, states)
        if gradients is None or list(map(len, self._states)) != self._state_sizes:
            return None
        fixed = [*self._params, *self._images]
        try:
            for name, holders in self._holders:
                fixed += map(name, holders)
            self.counts = list(map(_count, self._counting))
        except KeyError:  # one is gone
            return None
        # Types, dtypes, devices, sizes, strides, and whether they are sparse, conjugated, negated or fake.
        if not self._guards.check(*fixed, *gradients) or list(map(Tensor.data_ptr, fixed)) != self._addresses:
            return None
        addresses = array("q", map(Tensor.data_ptr, gradients))
        if addresses != known:  # others may have freed their memory
            held = [grad.untyped_storage().nbytes() for grad in gradients]
            if not all(map(ge, held, self._grad_bytes)):
                return None
        return addresses

    def _whole_gradients(
        self, param_groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, dict[str, Any]]
    ) -> Sequence[Any] | None:
        lists = list(map(_list_of_params, param_groups))
        if not self._is_whole or list(map(len, lists)) != self._group_sizes or len(states) != len(self._all_states):
            return None
        params = lists[0] if len(lists) == 1 else list(chain.from_iterable(lists))
        if not all(map(is_, params, self._all_params)) or not all(map(is_, states, self._all_keys)):
            return None
        if not all(map(is_, states.values(), self._all_states)):
            return None
        gradients = list(map(_gradient, params))
        if len(params) == len(self._params):
            return gradients
        return list(compress(gradients, self._has_grad)) if list(map(type, gradients)) == self._grad_types else None

    def _given(
        self, given: Sequence[ParamWithGrad], states: Mapping[Tensor, dict[str, Any]]
    ) -> Sequence[Tensor] | None:
        if self._is_whole or not _are_same([one.param for one in given], self._params):
            return None
        if [one.group_index for one in given] != self._group_indices:
            return None
        if not _are_same([states.get(param) for param in self._params], self._states):
            return None
        low_precision_copies = [one.low_precision_copy for one in given if one.low_precision_copy is not None]
        same = _are_same(low_precision_copies, self._images) and [len(one.grads) for one in given] == self._grad_counts
        return list(chain.from_iterable(one.grads for one in given)) if same else None


def is_plain(one: ParamWithGrad) -> bool:
    """Return whether a parameter and its gradients are tensors of no other class than torch's own."""
    return type(one.param) in (Tensor, nn.Parameter) and all(type(grad) is Tensor for grad in one.grads)


def tensor_guards(tensors: Sequence[Any]) -> Any:
    """Return PyTorch's own comparison of all that tensors are but where they lie, one call for all of them."""
    make: Any = guards.TensorGuards
    return make(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )


def _are_same(left: Sequence[object], right: Sequence[object]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))
