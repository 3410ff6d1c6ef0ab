"""Tests a model's own `train_step` on torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from keras import ops, tree
from torch.utils._python_dispatch import TorchDispatchMode

from accumtune.accumulation.own_step import certificate as certificates
from accumtune.accumulation.own_step import interception, own_gradients_torch, trial_samples
from accumtune.accumulation.own_step import own_train_step as own
from accumtune.accumulation.own_step import own_trial as trials
from accumtune.accumulation.own_step.dataflow import Recording, Rules, positions
from accumtune.accumulation.patched_attributes import replaced


def certified(model: Any, takes: list[Callable[[], Any]], form: int) -> own.Certificate:
    """Returns the certificate of a model, from the first samples of a window."""
    batch = trials.first_samples(model, takes)
    with trials.unchanged(model):
        found = certificates.certify(model, TorchTrial(model, form), batch)
    model.zero_grad()
    return found


class TorchTrial:
    """Runs the step operation by operation."""

    def __init__(self, model: Any, form: int) -> None:
        self.model, self.form = model, form
        self.rules = RULES
        self.hands_on_grad = True
        self._runs = 0

    def run(self, batch: Any, draws: Any, share: float, change_of_weights: float = 0.0, **how: Any) -> certificates.Run:
        recorder = _Recorder(Recording(self.rules), draws)
        data = tree.map_structure(lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), batch)
        recorder.mark([leaf for leaf in tree.flatten(data) if leaf is not None])
        self._runs += 1
        for variable in self.model.trainable_variables:
            # Another number in each run, so that a step without zero_grad() is found.
            variable.value.grad = torch.full_like(variable.value, 1e3 * self._runs)
        recorder.allow([variable.value.grad for variable in self.model.trainable_variables])
        one_hot = replaced(torch.nn.functional, {"one_hot": _one_hot})
        parameters = [variable.value for variable in self.model.trainable_variables]
        with (
            trials.other_weights(self.model, change_of_weights),
            one_hot,
            own_gradients_torch.seen(parameters, recorder.left_in_grad),
            recorder,
        ):
            found = trials.run(
                self.model,
                interception.packed(data, self.form),
                recorder.recording,
                recorder.stop,
                _key,
                lambda gradient: gradient,
                share,
                **how,
            )
        weights = {_key(variable.value) for variable in self.model.trainable_variables}
        trials.check_writes(self.model, recorder.wrote, are_of_weights=not weights.isdisjoint(recorder.wrote_to))
        self.hands_on_grad &= recorder.hands_on(found.keys)
        return found


_NLL = ("nll_loss_forward", "nll_loss2d_forward")


def _one_hot(labels: Any, num_classes: int = -1) -> Any:
    """As torch's one_hot, which reads numbers in Python to check them."""
    if num_classes < 0:
        num_classes = int(labels.max()) + 1
    return (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).long()


def _key(tensor: Any) -> Any:
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    """Records torch's operations in the `with` block, and replaces the results of random ones by those of `draws`."""

    def __init__(self, recording: Recording, draws: Any) -> None:
        super().__init__()
        self.recording, self._draws = recording, draws
        self._kept: list[Any] = []  # kept alive, so that no address is used twice
        self._is_on = True
        self.wrote: list[str] = []
        self.wrote_to: set[Any] = set()
        self._made: set[Any] = set()
        self._left: list[Any] = []  # of a backward pass, in `.grad`
        self._is_used = False

    def allow(self, values: list[Any]) -> None:
        """Allows a step to write to these tensors."""
        self._kept.append(values)
        self._made.update(_key(value) for value in values)

    def left_in_grad(self, parameter: Any) -> None:
        """Records the gradient that a backward pass has written."""
        self._kept.append(parameter.grad)
        self._left.append(_key(parameter.grad))

    def hands_on(self, keys: list[Any]) -> bool:
        """Returns whether these are the gradients of backward passes, each once, and unused by any operation."""
        return not self._is_used and len(set(self._left)) == len(self._left) and set(keys) <= set(self._left)

    def stop(self) -> None:
        self._is_on = False

    def mark(self, values: list[Any]) -> None:
        self._kept.append(values)
        self.recording.mark([_key(value) for value in values])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        is_draw = torch.Tag.nondeterministic_seeded in function.tags
        if is_draw:
            result = self._drawn(function, args, result)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        name = function.overloadpacket.__name__
        written = _tensors(args[0]) if inputs and name.endswith("_") and name != "detach_" else []
        outputs = outputs or written  # an operation on a list of tensors in place returns nothing
        writes = [_key(value) for value in written]
        past_keras = [key for key in writes if key not in self._made]
        self.wrote += [name] * len(past_keras)
        self.wrote_to.update(past_keras)
        self._made.update(_key(value) for value in outputs)
        if not self._is_on:
            return result
        if name in _NLL and args[3] == 0:  # without a reduction, its second result is no sum of weights
            outputs = outputs[:1]
        self._kept += [inputs, outputs]
        self._is_used = self._is_used or any(_key(value) in self._left for value in inputs)
        if name == "_to_copy" and not result.dtype.is_floating_point:
            name = "_to_copy (integers)"
        precision = str(outputs[0].dtype).removeprefix("torch.") if outputs else ""
        self.recording.add(name, _shaped(inputs), _shaped(outputs), writes, precision)
        if is_draw:
            self.recording.mark([_key(value) for value in outputs])
        return result

    def _drawn(self, function: Any, args: Any, result: Any) -> Any:
        name = function.overloadpacket.__name__
        if name == "native_dropout":  # on CUDA; its second result is the mask
            mask = torch.as_tensor(self._draws.next(result[1].cpu().numpy())).to(result[1].device)
            return args[0] * mask / (1 - args[1]), mask
        if not isinstance(result, torch.Tensor):
            raise trial_samples.NotPerSampleError(f"it draws random numbers by {name}, which cannot be held fixed.")
        held = torch.as_tensor(self._draws.next(result.detach().cpu().numpy())).to(result)
        result.copy_(held)
        return result


def _tensors(values: Any) -> list[Any]:
    found: list[Any] = []
    pending = [values]
    while pending:
        value = pending.pop(0)
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            pending = [*value, *pending]
        elif isinstance(value, dict):
            pending = [*value.values(), *pending]
    return found


def _shaped(values: list[Any]) -> list[tuple[Any, Any]]:
    return [(_key(value), tuple(value.shape)) for value in values]


RULES = Rules(
    linear=frozenset(
        "add add_ sub sub_ rsub neg _to_copy alias view _unsafe_view reshape sum mean stack cat slice select t "
        "transpose permute squeeze unsqueeze expand clone detach detach_ copy copy_ zeros_like ones_like full_like "
        "fill_ zero_ constant_pad_nd split lift_fresh contiguous flip "
        "new_zeros new_empty_strided empty_like as_strided unbind narrow diagonal select_backward "
        "slice_backward _foreach_add".split()
    ),
    products=frozenset("mul mul_ mm bmm matmul addmm dot mv addmv baddbmm".split()),
    linear_in=positions(
        "div div_ true_divide index index_select gather index_put index_put_ index_add embedding_dense_backward "
        "tanh_backward sigmoid_backward threshold_backward leaky_relu_backward elu_backward gelu_backward "
        "softplus_backward hardtanh_backward silu_backward _softmax_backward_data _log_softmax_backward_data"
    ),
    choices=frozenset("where".split()),
    reductions=frozenset(
        "sum mean mm bmm matmul addmm dot mv index_add index_put index_put_ _index_put_impl_ view _unsafe_view "
        "squeeze add_ mse_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss".split()
    ),
    only_shapes=frozenset(
        "zeros_like ones_like full_like empty_like new_zeros new_ones new_empty new_full new_empty_strided zero_ "
        "fill_ sym_size".split()
    ),
    decisions=frozenset("_local_scalar_dense is_nonzero equal nonzero".split()),
)
