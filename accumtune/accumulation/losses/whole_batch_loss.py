"""The loss of the whole effective batch, if it is not a mean over samples (contrastive losses, Dice, correlation).

A window runs twice ("GradCache": Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", 2021). The first pass keeps only the outputs of each micro-batch. Keras's own loss of all outputs
together gives the gradient with respect to each output. The second pass runs each micro-batch again, with the random
seeds of the first pass, and propagates its part of that gradient:

    dL/dw  =  dL/dw directly  +  sum over micro-batches j of  (d outputs[j] / dw)^T  dL/d outputs[j]

Losses that layers add are outputs too; a window's is the mean over its samples. Each engine runs the passes in a file
of its own; this file has the parts that they share, and imports no framework.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accumtune.accumulation.losses import loss_shares
from accumtune.accumulation.own_step.own_train_step import has_own_step
from accumtune.accumulation.patched_attributes import put, replaced
from accumtune.errors import DataError, ModelError

_FALSE = "accumulate(model, ..., whole_batch_loss=False), which takes a mean of the losses of micro-batches"

_CHOICE = "_accumtune_choice_of_loss"

# Allowed differences of the second pass's outputs, relative to the largest: above rounding, below other random draws.
_TOLERANCES = {"float64": 1e-4, "float32": 2e-2}
_TOLERANCE_OF_HALF_PRECISION = 0.1


def chosen_for(model: Any, choice: bool | str) -> None:
    """Records the choice of a search or configuration, which later calls of `accumulate` take for "auto"."""
    put(model, {_CHOICE: choice})


def choice_of(model: Any, asked: bool | str = "auto") -> bool | str:
    """Returns the argument of `accumulate`; if that is "auto", the choice that `chosen_for` has recorded."""
    return getattr(model, _CHOICE, asked) if asked == "auto" else asked


def is_wanted(model: Any) -> bool:
    """Returns whether a model's windows need two passes, or would if it accumulated; found once for each `compile`."""
    from accumtune.accumulation.coupling.detection import couples_samples_in_its_loss

    if has_own_step(model):
        return False
    accumulation = getattr(model, "_accumtune_accumulation", None)
    chosen = choice_of(model) if accumulation is None else accumulation.whole_batch_loss
    if chosen != "auto":
        return bool(chosen)
    compiled, found = getattr(model, "_accumtune_whole_batch_loss", (None, None))
    if found is None or compiled is not model._compile_loss:
        found = couples_samples_in_its_loss(model)
        if accumulation is not None:
            put(model, {"_accumtune_whole_batch_loss": (model._compile_loss, found)})
    return bool(found)


def check_devices(model: Any, devices: int) -> None:
    """Raises ModelError if the outputs of a window are spread over devices."""
    if devices > 1:
        raise ModelError(
            f"Received model {model.name!r} on {devices} replicas, and a loss over the whole effective batch.",
            "one replica: the outputs of several are not joined.",
            f"train on one device, or use {_FALSE}.",
        )


def _has_state(what: str) -> ModelError:
    return ModelError(
        f"Received {what}, and a loss over the whole effective batch.",
        "layers whose only state are random seeds and the statistics of BatchNormalization: with such a loss, each "
        "micro-batch is run twice.",
        f"leave the layer out, freeze it, or use {_FALSE}.",
    )


# Seeds and other state


def seed_states(model: Any) -> list[Any]:
    """Returns the variables of the seeds from which a forward pass draws its random numbers."""
    from keras.src.random.seed_generator import global_seed_generator

    layers = model._flatten_layers(include_self=True)
    generators = [generator for layer in layers for generator in layer._seed_generators]
    states = [generator.state for generator in (*generators, global_seed_generator())]
    return list({id(state): state for state in states}.values())


@contextlib.contextmanager
def without_state(model: Any, states: Sequence[Any]) -> Iterator[None]:
    """Raises ModelError after a forward pass (traced or run) that changed variables other than seeds and metrics."""
    known = [*states, *model.metrics_variables]
    with _assignments() as assigned:
        yield
    for variable in _others(assigned, known):
        owner = next((layer for layer in model._flatten_layers() if _owns(layer, variable)), None)
        if owner is None:
            raise _has_state(f"the variable {variable.path!r}, which a forward pass changes and no layer keeps")
        raise _has_state(f"layer {owner.name!r} ({type(owner).__name__}), which changes its variable {variable.name!r}")


@contextlib.contextmanager
def without_changes(model: Any, states: Sequence[Any]) -> Iterator[None]:
    """Raises ModelError after a loss (traced or run) that changed variables other than seeds and metrics."""
    known = [*states, *model.metrics_variables]
    with _assignments() as assigned:
        yield
    for variable in _others(assigned, known):
        raise ModelError(
            f"Received a loss over the whole effective batch that changes the variable {variable.path!r}.",
            "a loss that computes: each micro-batch is run again after it, with the variables that it leaves behind.",
            f"change the variable in a callback's on_train_batch_end, or use {_FALSE}.",
        )


@contextlib.contextmanager
def _assignments() -> Iterator[list[Any]]:
    """Collects assigned variables in the list, inside the `with` block; not those whose own `assign` is replaced."""
    import keras

    kind, assigned = keras.Variable, list[Any]()
    inherited, own = kind.assign, vars(kind).get("assign")

    def assign(variable: Any, value: Any) -> Any:
        assigned.append(variable)
        return inherited(variable, value)

    kind.assign = assign
    try:
        yield assigned
    finally:
        if own is None:
            del kind.assign
        else:
            kind.assign = own


def _others(assigned: Sequence[Any], known: Sequence[Any]) -> list[Any]:
    ids = {id(variable) for variable in known}
    return [variable for variable in assigned if id(variable) not in ids]


def _owns(layer: Any, variable: Any) -> bool:
    kept = [*layer._trainable_variables, *layer._non_trainable_variables]
    kept += [generator.state for generator in layer._seed_generators]
    return any(variable is one for one in kept)


@contextlib.contextmanager
def metrics_at_rest(model: Any) -> Iterator[None]:
    """Keeps the metrics' values inside the `with` block: the first pass has updated those of layers already."""
    with contextlib.ExitStack() as changed:
        for variable in model.metrics_variables:
            changed.enter_context(replaced(variable, {"assign": lambda value: value}))
        yield


# Losses of layers


def losses_of_layers(model: Any, losses: Sequence[Any] | None = None) -> list[Any]:
    """Returns the losses that layers added in the last forward pass, each as one number; without regularizers.

    Args:
        losses: `model.losses` of that pass; None: read them from the model.
    """
    losses = list(model.losses if losses is None else losses)
    regularizers = sum(weight.regularizer is not None for weight in model.trainable_weights)
    return [model._aggregate_additional_loss(loss) for loss in losses[: len(losses) - regularizers]]


@contextlib.contextmanager
def with_losses_of_layers(model: Any, losses: Sequence[Any]) -> Iterator[None]:
    """Makes `model.losses` these losses and the regularizers', inside the `with` block."""
    if not losses:
        yield
        return
    with replaced(model, {"_losses_override": [*losses, *model._get_regularization_losses()]}):
        yield


def mean_losses(losses: Sequence[Sequence[Any]], shares: Sequence[float]) -> list[Any]:
    """Returns the losses that layers added in a window: the means of its micro-batches' losses, by their shares."""
    if len({len(of_one) for of_one in losses}) > 1:
        numbers = sorted({len(of_one) for of_one in losses})
        raise ModelError(
            f"Received layers that add {numbers} losses, depending on the micro-batch.",
            "as many in each micro-batch.",
            "call add_loss in every forward pass, with 0 where there is nothing to add.",
        )
    return [sum(share * loss for share, loss in zip(shares, one, strict=True)) for one in zip(*losses, strict=True)]


# Outputs


def joined(parts: Sequence[Any], samples: Sequence[int], name: str, concatenate: Callable[[list[Any]], Any]) -> Any:
    """Returns the structures of arrays of all micro-batches as one, concatenated along the samples.

    Args:
        samples: the number of samples of each micro-batch.
        name: the arrays' name in errors.

    Raises:
        DataError: micro-batches differ in shape.
        ModelError: an array's first axis is not that of the samples.
    """
    from keras import tree

    def join(*leaves: Any) -> Any:
        if all(leaf is None for leaf in leaves):
            return None
        shapes = [None if leaf is None else tuple(leaf.shape) for leaf in leaves]
        if any(shape is None or shape[:1] != (number,) for shape, number in zip(shapes, samples, strict=True)):
            first = next(index for index, shape in enumerate(shapes) if shape is None or shape[:1] != (samples[index],))
            raise ModelError(
                f"Received {name} of shape {shapes[first]} for {samples[first]} samples, and a loss over the whole "
                "effective batch.",
                f"{name} whose first axis is that of the samples, so that those of micro-batches can be joined.",
                "give each sample one entry: several views of it belong on another axis (ops.stack(..., axis=1)); what "
                f"is computed between samples belongs in the loss. Or use {_FALSE}.",
            )
        if len({shape[1:] for shape in shapes if shape is not None}) > 1:
            raise DataError(
                f"Received {name} of the shapes {sorted(set(map(str, shapes)))} in the micro-batches of one update, "
                "and a loss over the whole effective batch.",
                f"{name} of one shape but for the number of samples: others cannot be joined.",
                f"pad the data of an effective batch to one length, or use {_FALSE}.",
            )
        return concatenate(list(leaves))

    return tree.map_structure(join, *parts)


class Outputs:
    """Flattens a model's outputs to a list of arrays with their masks, and restores the model's structure."""

    def __init__(self) -> None:
        self._structure: Any = None

    def flat(self, y_pred: Any) -> tuple[list[Any], list[Any]]:
        """Returns the arrays and their masks (None: no mask); notes the structure."""
        from keras import tree

        self._structure = tree.map_structure(lambda _: None, y_pred)
        leaves = tree.flatten(y_pred)
        return leaves, [None if leaf is None else loss_shares.mask_of(leaf) for leaf in leaves]

    def packed(self, leaves: Sequence[Any], masks: Sequence[Any]) -> Any:
        """Returns the structure of these arrays, with their masks attached."""
        from keras import tree
        from keras.src import backend

        for leaf, mask in zip(leaves, masks, strict=True):
            if mask is not None:
                backend.set_keras_mask(leaf, mask)
        return tree.pack_sequence_as(self._structure, leaves)


_NAMES = ("outputs", "masks of outputs", "inputs", "targets", "sample weights")


def joined_all(given: Sequence[Any], samples: Sequence[int], concatenate: Callable[[list[Any]], Any]) -> list[Any]:
    """Joins the outputs, their masks, inputs, targets and sample weights of a window's micro-batches."""
    columns = zip(zip(*given, strict=True), _NAMES, strict=True)
    return [joined(column, samples, name, concatenate) for column, name in columns]


def reads_inputs(model: Any) -> bool:
    """Returns whether the loss or the metrics may read `x`; only then it is joined."""
    import keras

    own = (type(model).compute_loss, type(model).compute_metrics)
    is_stock = own == (keras.Model.compute_loss, keras.Model.compute_metrics)
    return not is_stock or bool({"compute_loss", "compute_metrics"} & set(vars(model)))


class Replay:
    """Checks in the first window that the second pass computes the same outputs as the first."""

    def __init__(self) -> None:
        self._is_sure = False
        self._outputs: list[Any] | None = None

    def begin(self, outputs: list[Any]) -> None:
        """Notes the joined outputs of the first pass."""
        self._outputs = None if self._is_sure else outputs

    def compare(self, again: list[Any], part: slice) -> None:
        """Raises ModelError if a micro-batch's outputs differ from the first pass's."""
        from keras import ops

        for one, other in zip(self._outputs or [], again, strict=True) if self._outputs is not None else ():
            if one is None or not ops.size(other):
                continue
            tolerance = _TOLERANCES.get(str(ops.dtype(other)), _TOLERANCE_OF_HALF_PRECISION)
            one, other = ops.cast(one[part], "float32"), ops.cast(other, "float32")
            difference, largest = float(ops.max(ops.abs(one - other))), float(ops.max(ops.abs(one)))
            if difference > tolerance * largest:
                raise ModelError(
                    f"Received a model whose outputs differ by {difference:.2g} (of at most {largest:.2g}) when a "
                    "micro-batch is run a second time, as a loss over the whole effective batch needs it.",
                    "random numbers that are drawn by Keras from a SeedGenerator of a layer, and no hidden state.",
                    "use keras.random with self.seed_generator = keras.random.SeedGenerator(...) in place of the "
                    f"framework's or NumPy's random numbers, or {_FALSE}.",
                )

    def end(self) -> None:
        """Ends the window: later ones are not compared."""
        self._is_sure, self._outputs = True, None
