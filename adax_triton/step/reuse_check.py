"""Check quickly that only gradient addresses and step counts changed."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter, ge, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch._C._dynamo import guards

from adax_triton.state.allocation import STATE_TENSORS
from adax_triton.state.dtensor import Shards, is_dtensor, local_tensor

from .collect import ParamWithGrad

_gradient = attrgetter("grad")
_options = itemgetter("weight_rounding", "capturable")
_list_of_params = itemgetter("params")
_count = itemgetter("step")


class ReuseCheck:
    """Snapshot of a step's tensors and groups, to compare later steps with.

    Args:
        params: parameters of the step, plain tensors or DTensors that need no copies.
        param_states: the state of each of them.
        counted_on_device: whether each of them is device-counted.
        param_groups: the optimizer's groups.
        states: the optimizer's states.
        covers_all_params: whether `params` are all parameters that have a `grad`.

    Attributes:
        counts: step counts of the host-counted parameters, set by `gradient_addresses`.
    """

    def __init__(
        self,
        params: Sequence[ParamWithGrad],
        param_states: Sequence[dict[str, Any]],
        counted_on_device: Sequence[bool],
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
        covers_all_params: bool,
    ) -> None:
        self._params = [item.param for item in params]
        self._covers_all_params = covers_all_params
        self._group_indices = [item.group_index for item in params]
        self._grad_counts = [len(item.grads) for item in params]
        self._copies = [item.low_precision_copy for item in params if item.low_precision_copy is not None]
        self._options = list(map(_options, param_groups))
        if covers_all_params:
            lists = list(map(_list_of_params, param_groups))
            self._group_sizes = list(map(len, lists))
            self._all_params = list(chain.from_iterable(lists))
            self._all_keys, self._all_states = list(states), list(states.values())
            self._has_grad = [param.grad is not None for param in self._all_params]
            self._grad_types = [type(param.grad) for param in self._all_params]
        self._states = param_states
        self._state_sizes = list(map(len, param_states))
        counted_on_host = [not on_device for on_device in counted_on_device]
        self._host_counted = list(compress(param_states, counted_on_host))
        states_with = {name: [state for state in param_states if name in state] for name in STATE_TENSORS}
        states_with["step"] = list(compress(param_states, counted_on_device))
        self._states_with = [(itemgetter(name), holders) for name, holders in states_with.items() if holders]
        state_tensors = chain.from_iterable(map(get, holders) for get, holders in self._states_with)
        fixed = [*self._params, *self._copies, *state_tensors]
        gradients = list(chain.from_iterable(item.grads for item in params))
        self._shards = Shards([*fixed, *gradients]) if any(map(is_dtensor, fixed)) else None
        local = [*fixed, *gradients] if self._shards is None else self._shards.local_tensors([*fixed, *gradients])
        assert local is not None
        self._addresses = list(map(Tensor.data_ptr, local[: len(fixed)]))
        self._guards = tensor_guards(local)
        self._grad_bytes = [grad.nbytes for grad in local[len(fixed) :]]
        self.counts: list[Any] = []

    def gradient_addresses(
        self,
        param_groups: Sequence[Mapping[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
        given: Sequence[ParamWithGrad] | None,
        known: array[int],
    ) -> array[int] | None:
        """Return this rank's gradient addresses, or None if anything else changed.

        Step counts may have changed, too.

        Args:
            param_groups: the optimizer's groups.
            states: the optimizer's states.
            given: the parameters; None if the step covers all parameters that have a `grad`.
            known: gradient addresses of the previous step.
        """
        if list(map(_options, param_groups)) != self._options:
            return None
        gradients = self._all_gradients(param_groups, states) if given is None else self._given_gradients(given, states)
        if gradients is None or list(map(len, self._states)) != self._state_sizes:
            return None
        fixed = [*self._params, *self._copies]
        try:
            for get, holders in self._states_with:
                fixed += map(get, holders)
            self.counts = list(map(_count, self._host_counted))
        except KeyError:  # a state tensor was removed
            return None
        if self._shards is not None:
            local = self._shards.local_tensors([*fixed, *gradients])
            if local is None:
                return None
            fixed, gradients = local[: len(self._addresses)], local[len(self._addresses) :]
        # The guards compare type, dtype, device, sizes, strides and dispatch keys (sparse, lazily negated, fake).
        if not self._guards.check(*fixed, *gradients) or list(map(Tensor.data_ptr, fixed)) != self._addresses:
            return None
        addresses = array("q", map(Tensor.data_ptr, gradients))
        if addresses != known:  # a gradient at a new address may have a freed storage
            storage_bytes = [grad.untyped_storage().nbytes() for grad in gradients]
            if not all(map(ge, storage_bytes, self._grad_bytes)):
                return None
        return addresses

    def _all_gradients(
        self, param_groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, dict[str, Any]]
    ) -> Sequence[Any] | None:
        lists = list(map(_list_of_params, param_groups))
        if (
            not self._covers_all_params
            or list(map(len, lists)) != self._group_sizes
            or len(states) != len(self._all_states)
        ):
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

    def _given_gradients(
        self, given: Sequence[ParamWithGrad], states: Mapping[Tensor, dict[str, Any]]
    ) -> Sequence[Tensor] | None:
        if self._covers_all_params or not _are_same([item.param for item in given], self._params):
            return None
        if [item.group_index for item in given] != self._group_indices:
            return None
        if not _are_same([states.get(param) for param in self._params], self._states):
            return None
        low_precision_copies = [item.low_precision_copy for item in given if item.low_precision_copy is not None]
        if not _are_same(low_precision_copies, self._copies):
            return None
        if [len(item.grads) for item in given] != self._grad_counts:
            return None
        return list(chain.from_iterable(item.grads for item in given))


def has_plain_tensors(item: ParamWithGrad) -> bool:
    """Return whether the local parameter and gradients are plain tensors."""
    param, *grads = map(local_tensor, (item.param, *item.grads))
    return type(param) in (Tensor, nn.Parameter) and all(type(grad) is Tensor for grad in grads)


def tensor_guards(tensors: Sequence[Any]) -> Any:
    """Return a torch guard that compares all tensors in one call."""
    make: Any = guards.TensorGuards
    return make(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )


def _are_same(left: Sequence[object], right: Sequence[object]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))
