"""Recognizes out-of-memory errors of all frameworks, by the names of their types: no framework is imported."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

# ResourceExhaustedError is not among them: TensorFlow raises it for full queues, message sizes and open files too.
_MEMORY_ERROR_NAMES = {"MemoryError", "OutOfMemoryError", "_ArrayMemoryError"}
_MEMORY_TEXT = re.compile(
    r"\bOOM\b|out of memory|out-of-memory|not enough memory|can(?:'|no)t allocate memory|unable to allocate"
    r"|fail(?:ed|ure) to allocate|ran out of (?:device |GPU )?memory|CUDA_ERROR_OUT_OF_MEMORY|_ALLOC_FAILED"
    r"|memory exhausted|exceeds? (?:the )?(?:available )?memory|MemoryError"
    # torch, where no workspace of cuDNN fits (pytorch#108645); a broken cuDNN says the same, whatever the size.
    r"|unable to find an engine to execute this computation|CUDNN_STATUS_NOT_SUPPORTED"
    # XLA, where no algorithm that it tried for a convolution or a product got its memory (jax#8506, thera#10).
    r"|No reference output found|Failed to determine best cudnn convolution algorithm"
    # XLA on a TPU; CUDA's own name; torch, whose words for a full GPU ask the driver who holds it (pytorch#112377).
    r"|Attempting to (?:allocate|reserve) [\d.]+[KMGT]|cudaErrorMemoryAllocation"
    r"|NVML_SUCCESS == r INTERNAL ASSERT FAILED[^\n]*CUDACachingAllocator",
    re.IGNORECASE,
)
# Types of errors that count if their text is about memory. Errors of the user's own code are not among them: a
# ValueError that mentions memory is about something else.
_SPEAKS_OF_MEMORY = {
    "ResourceExhaustedError", "InternalError", "UnknownError", "AbortedError", "NotFoundError",  # tf.errors
    "XlaRuntimeError", "JaxRuntimeError", "RuntimeError", "AcceleratorError",  # jax, torch
    "OSError",
}  # fmt: skip


def is_out_of_memory(exception: BaseException) -> bool:
    """Returns whether an exception, or its cause, says that a device or a host ran out of memory.

    Example:

    >>> is_out_of_memory(MemoryError())
    True
    """
    return any(_is_memory_error(one) for one in _chain(exception))


def died_of_memory(exit_signal: int, log: str = "", *, is_limited: bool = False) -> bool:
    """Returns whether a process that was ended by a signal most likely ran out of memory.

    TensorFlow's oneDNN kernels do not check whether they got their buffer: with a limited allocator, running out of
    memory can end in a segmentation fault instead of an exception (seen on TensorFlow 2.21, Conv2D).

    Args:
        exit_signal: the number of the signal.
        log: what the process wrote to its standard error.
        is_limited: whether its allocator was limited.
    """
    if exit_signal == signal.SIGKILL or _MEMORY_TEXT.search(log):
        return True
    return is_limited and exit_signal in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


def _is_memory_error(exception: BaseException) -> bool:
    names = {cls.__name__ for cls in type(exception).__mro__}
    if names & _MEMORY_ERROR_NAMES:
        return True
    text = str(exception)
    if "InternalError" in names and "Dst tensor is not initialized" in text:
        return True  # TensorFlow's message for a copy to a full GPU
    return bool(names & _SPEAKS_OF_MEMORY) and _MEMORY_TEXT.search(text) is not None


def _chain(exception: BaseException) -> Iterator[BaseException]:
    """Yields the exception, its causes and contexts, and the members of groups."""
    waiting, seen = [exception], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if one.__cause__ is not None:
            waiting.append(one.__cause__)
        elif one.__context__ is not None and not one.__suppress_context__:
            waiting.append(one.__context__)
        if isinstance(one, BaseExceptionGroup):
            waiting.extend(one.exceptions)
