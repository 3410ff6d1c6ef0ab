"""What a search tells its user once, before it begins."""

from __future__ import annotations

from collections.abc import Sequence


def advice(
    *,
    hyperparameters: Sequence[str],
    effective_batch_sizes: Sequence[int],
    learning_rate_scaling: str | None,
    batch_coupled_layers: Sequence[str],
    searches_pairs: bool,
    whole_batch_loss: bool = False,
    samples: int | None = None,
) -> list[str]:
    """One sentence for each thing in the set-up that changes what the results mean.

    Args:
        hyperparameters: the names of all that are tuned.
        effective_batch_sizes: those that are searched.
        learning_rate_scaling: as given to the tuner.
        batch_coupled_layers: of the models that the build function makes.
        searches_pairs: whether the micro-batch size is searched too.
        whole_batch_loss: whether the loss is that of the whole effective batch, in two passes.
        samples: in the training data; None where that is not known.
    """
    texts = []
    if batch_coupled_layers:
        consequence = (
            "so micro-batch sizes are searched too"
            if searches_pairs
            else "so two pairs of one effective batch are not the same training (search_over='pairs' tells them apart)"
        )
        layers = "; ".join(batch_coupled_layers[:5])
        texts.append(f"Not every layer is independent of which samples share a micro-batch, {consequence}: {layers}")
    if whole_batch_loss:
        texts.append(
            "The loss couples the samples of a batch, so it is that of the whole effective batch, in two passes: every "
            "micro-batch size trains the same. Losses of different batch sizes do not compare; val_loss is that of "
            "validation_batch_size samples, 32 by default, in all trials."
        )
    if len(effective_batch_sizes) > 1 and learning_rate_scaling is None and not any(map(_is_rate, hyperparameters)):
        texts.append(
            "The effective batch varies, but the learning rate is neither tuned nor scaled with it: large batches "
            "will look worse than they are (learning_rate_scaling='sqrt', or hp.Float('learning_rate', ...))."
        )
    whole = [size for size in effective_batch_sizes if samples is not None and size >= samples]
    if len(whole) > 1:
        texts.append(
            f"The training data have {samples} samples, so effective batches {', '.join(map(str, whole))} are all the "
            "same: one update per epoch with all of them (fewer accumulation_steps leave these out)."
        )
    return texts


def _is_rate(name: str) -> bool:
    words = name.lower().replace("-", "_").split("_")
    return "learning" in words or "lr" in words
