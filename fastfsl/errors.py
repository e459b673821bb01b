"""The errors fastfsl raises on purpose.

Every message states what was expected, what was got and what to do. The command line prints it and exits with code 2.
"""

import errno
import re

# What an operating system says of one path or file. Every other failure to read is the machine's: file handles, memory,
# disk, network.
_OWN_FAULTS = frozenset(
    getattr(errno, name)
    for name in (
        "ENOENT",
        "ENOTDIR",
        "EISDIR",
        "EACCES",
        "EPERM",
        "ELOOP",
        "ENAMETOOLONG",
        "EINVAL",
        "EILSEQ",
        "ENXIO",
        "EFBIG",
        "EOVERFLOW",
        "EEXIST",
        "ENOTEMPTY",
        "EROFS",
        "EBUSY",
        "ETXTBSY",
    )
    if hasattr(errno, name)
)

_REMEDIES = {
    "EMFILE": "raise the limit of open files (ulimit -n)",
    "ENFILE": "close other programs, or raise the system's limit of open files",
    "ENOMEM": "free memory, or use fewer threads and smaller batches",
    "ENOSPC": "free some disk space",
    "EDQUOT": "free some of your disk quota",
}

# Libraries written in Rust leave the number in the text.
_NUMBER_IN_TEXT = re.compile(r"\(os error (\d{1,5})\)$")

# RuntimeErrors of Python's threads, of torch's allocator on the CPU, and of C++.
_RUNTIME_FAULTS = (
    ("can't start new thread", "lower the number of threads, or raise the limit of processes (ulimit -u)"),
    ("DefaultCPUAllocator", _REMEDIES["ENOMEM"]),
    ("bad_alloc", _REMEDIES["ENOMEM"]),
    ("bad allocation", _REMEDIES["ENOMEM"]),
)


class FastFSLError(Exception):
    """Base class of every error that fastfsl raises on purpose."""


class DataError(FastFSLError, ValueError):
    """The user's data cannot be used: missing, unreadable, mislabelled or too few."""


class ShapeError(FastFSLError, ValueError):
    """An array or tensor has the wrong shape or dtype."""


class DTypeError(ShapeError, TypeError):
    """An array holds something that is no number."""


class BundleError(FastFSLError):
    """A bundle, plan or run folder is incomplete, altered or of an unknown format."""


class DeviceError(FastFSLError, RuntimeError):
    """The device asked for cannot be used on this machine."""


class ConfigError(FastFSLError, ValueError):
    """An option, model name, checkpoint, output path or missing optional package stands in the way."""


class OverloadError(FastFSLError, RuntimeError):
    """More is asked of a running classifier than it keeps up with; nothing was accepted."""


class ClosedError(FastFSLError, RuntimeError):
    """A classifier or batcher is used after it was closed."""


class ResourceError(FastFSLError, RuntimeError):
    """The machine has no memory, file handles, threads or disk space left, or its storage fails.

    Neither the data nor the bundle are to blame. It ends a run even where unreadable images are only marked, and the
    same call may succeed later.
    """


def resource_error(error: BaseException, doing: str) -> ResourceError | None:
    """The machine's fault behind an error, or None if the error says something about the file or the data.

    Used as ``raise resource_error(error, f"read {path}") or DataError(...) from error``.

    Args:
        error: what was caught.
        doing: completes "cannot ...".
    """
    if isinstance(error, ResourceError):
        return error
    if isinstance(error, MemoryError):
        return memory_error(doing)
    if isinstance(error, OSError):
        in_text = _NUMBER_IN_TEXT.search(str(error)) if error.errno is None else None
        number = int(in_text[1]) if in_text else error.errno
        if number is None or number in _OWN_FAULTS:
            return None
        remedy = _REMEDIES.get(errno.errorcode.get(number, ""), "check the disk or network it lies on")
        return _resource_error(doing, error.strerror or str(error), remedy)
    if isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime"):
        for mark, remedy in _RUNTIME_FAULTS:
            if mark in str(error):
                return _resource_error(doing, mark if "thread" in mark else "out of memory", remedy)
    return None


def memory_error(doing: str) -> ResourceError:
    """The error for want of memory; ``doing`` completes "cannot ..."."""
    return _resource_error(doing, "out of memory", _REMEDIES["ENOMEM"])


def _resource_error(doing: str, reason: str, remedy: str) -> ResourceError:
    return ResourceError(f"cannot {doing}: {reason[:1].lower()}{reason[1:]}; {remedy}, then run it again")
