"""Exact gradient accumulation inside one Keras step.

    model = accumulate(model, micro_batch_size=32)
    model.fit(x, y, batch_size=256)         # 8 forward and backward passes of 32, one update, as if 256 had fitted

The whole window (the effective batch) is one Keras step: learning-rate schedules, EMA, clipping, callbacks and
`optimizer.iterations` see updates. No framework is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accumtune.accumulation.coupling.detection import Coupling, batch_coupled_layers
from accumtune.accumulation.window import Accumulation

if TYPE_CHECKING:
    import keras

__all__ = [
    "Accumulation",
    "Coupling",
    "accumulate",
    "accumulation_of",
    "batch_coupled_layers",
    "stop_accumulating",
]


def accumulate(
    model: keras.Model,
    micro_batch_size: int | None = None,
    *,
    accumulation_steps: int | None = None,
    whole_batch_loss: bool | str = "auto",
    ghost_batch_size: int | None = None,
) -> keras.Model:
    """Makes `model` train with exact gradient accumulation.

    Give either `micro_batch_size` or `accumulation_steps`. With `micro_batch_size=m`, the batches of `fit` and
    `train_on_batch` are effective batches; each is split into micro-batches of m samples (the last may be smaller) and
    makes one update. With `accumulation_steps=k`, the batches of `fit` are the micro-batches and k of them make one
    update; an incomplete window at the end of an epoch makes an update too, with its true weight. Either way one Keras
    step is one update: `steps_per_epoch`, the progress bar, batch callbacks, schedules, EMA and `optimizer.iterations`
    count updates.

    Training then equals plain Keras at the effective batch (`batch_coupled_layers` lists a model's exceptions):
    gradients are summed in float32 (float64 for float64 variables), and each micro-batch has the weight that it has in
    the whole batch, with sample weights, class weights, masks and every loss reduction. Dropout draws a new mask per
    micro-batch.
    BatchNormalization normalizes per micro-batch, or per ghost batch, but its moving statistics after an update are
    those of the effective batch, with the momentum applied once. Gradients of embeddings are dense.

    With `ghost_batch_size=g`, BatchNormalization normalizes each window in consecutive groups of g samples, whatever
    the micro-batch; the rest of a window that is no multiple of g is a smaller group (Hoffer, Hubara and Soudry, "Train
    longer, generalize better", 2017). Every micro-batch that is a multiple of g is then the same training. Inference is
    as in plain Keras.

    A loss that couples the samples of a batch (contrastive, in-batch softmax, Dice over the batch, correlation, an
    overridden `compute_loss`) is computed over the whole effective batch, in two passes: the outputs of all
    micro-batches without gradients, then each micro-batch again, with the same random numbers and its part of the
    gradient. That costs a second forward pass, and the memory of the effective batch's outputs. Outputs must have the
    samples as their first axis; layers with a state, a loss that changes variables and several replicas are refused.

    With `micro_batch_size`, `fit` validates in micro-batches unless `validation_batch_size` says otherwise, so that
    validation needs no more memory than training. On one device `val_loss` is that of plain Keras, also with masks;
    but with a mask that a layer of yours sets without a `compute_mask`, micro-batches count by their samples.

    With `tf.distribute.MirroredStrategy` or `keras.distribution.DataParallel`, a micro-batch is what one device
    holds: the effective batch is micro_batch_size * accumulation_steps * devices, and BatchNormalization's moving
    statistics are those of all devices together. (`synchronized=True` also normalizes over the devices; plain
    Keras without it keeps what one device saw.)
    A strategy with replicas in other processes (`MultiWorkerMirroredStrategy` over several workers) is refused. A loss
    that returns one number per batch counts as it does on one device; plain Keras adds it up over the replicas.

    If the model's class overrides `fit` (KerasHub's tasks do, to preprocess their data), or an autologger has wrapped
    it, that `fit` is called, and the data that it passes to Keras are accumulated.

    Micro-batches of different shapes (sequences padded to different lengths) are weighted by their number of loss
    values, so each token counts the same.

    Args:
        model: a compiled Functional, Sequential or subclassed `keras.Model`. If it has a `train_step` of its own,
            whether that accumulates exactly is tested on the first batch (page "Models with a train_step of their
            own"). The arguments of `compile` (run_eagerly, jit_compile, steps_per_execution) keep their meaning.
        micro_batch_size: samples in one forward and backward pass, at least 1.
        accumulation_steps: micro-batches per update, at least 1.
        ghost_batch_size: samples that BatchNormalization normalizes together in training, at least 1; each micro-batch
            but the last of a window is a multiple of it. Default: the micro-batch.
        whole_batch_loss: "auto": two passes if a loss couples the samples of a batch, found as `batch_coupled_layers`
            finds it. True: always two passes. False: never; the loss is then the mean of the micro-batches' losses,
            and `batch_coupled_layers` lists it.

    Returns:
        The same model. It saves, loads and clones as a plain Keras model; a loaded copy does not accumulate.
        Call `accumulate` again to change the micro-batch, `accumtune.accumulation.stop_accumulating` to return to plain
        Keras.

    Raises:
        BatchSizeError: both or neither of `micro_batch_size` and `accumulation_steps` are given, a size is not a whole
            number of at least 1, or the micro-batch is not a multiple of the ghost batch.
        UncompiledModelError: the model was not compiled.
        CustomTrainStepError: the model's class overrides `make_train_function`; raised by `fit`: its `train_step`
            cannot be accumulated exactly.
        ModelError: `model` is not a `keras.Model`, its optimizer accumulates by itself, or `whole_batch_loss` has
            another value; with `ghost_batch_size`, a trainable BatchNormalization has `renorm=True`, is synchronized
            over several replicas, or overrides `call`. Raised by `fit`: two passes are needed and the model cannot run
            a micro-batch twice, see above.

    Example:

    >>> model = accumulate(model, micro_batch_size=8)
    >>> model.fit(x, y, batch_size=64)
    """
    from accumtune.accumulation import attach as training

    accumulation = Accumulation.read(micro_batch_size, accumulation_steps, ghost_batch_size, whole_batch_loss)
    return training.install(model, accumulation)


def stop_accumulating(model: keras.Model) -> keras.Model:
    """Makes `model` train as plain Keras again, and frees its accumulators. Returns the same model."""
    from accumtune.accumulation import attach as training

    return training.remove(model)


def accumulation_of(model: Any) -> Accumulation | None:
    """How `model` accumulates (`.micro_batch_size` or `.accumulation_steps`), or None where it does not."""
    return getattr(model, "_accumtune_accumulation", None)
