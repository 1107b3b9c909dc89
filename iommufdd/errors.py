"""The errors a handler may raise: an errno with its reason, answered to the caller; or ProtocolError, which hangs up.

`raise EINVAL("pt_id is not a nesting parent")` is the kernel's `return -EINVAL`, with a reason that the trace and the
client can show. Only ioctl() of an open file (Context, VfioDeviceFile) turns an IommufdError into an answer.
"""

import errno as _errno
from typing import ClassVar


class IommufdError(Exception):
    """An errno for the caller; `reason` is one line for people."""

    errno: ClassVar[int]

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def name(self) -> str:
        return type(self).__name__


class ProtocolError(Exception):
    """The peer broke the wire protocol: no answer, the channel is closed."""


class EPERM(IommufdError):
    """The caller lacks the right, or wants to write what is read-only."""

    errno = _errno.EPERM


class ENOENT(IommufdError):
    """An id, an area or an item that does not exist (or has another type)."""

    errno = _errno.ENOENT


class EIO(IommufdError):
    """The hardware refused the request."""

    errno = _errno.EIO


class ENXIO(IommufdError):
    """mmap of an offset that was never given out; a mapping that no table entry is small enough for."""

    errno = _errno.ENXIO


class E2BIG(IommufdError):
    """Bytes beyond the structure this version knows are not zero."""

    errno = _errno.E2BIG


class EBADF(IommufdError):
    """Not an open file descriptor."""

    errno = _errno.EBADF


class ENOMEM(IommufdError):
    """Memory, or the caller's limit of locked memory, is exhausted."""

    errno = _errno.ENOMEM


class EFAULT(IommufdError):
    """Memory of the caller that cannot be read, written or pinned."""

    errno = _errno.EFAULT


class EBUSY(IommufdError):
    """The object is in use."""

    errno = _errno.EBUSY


class EEXIST(IommufdError):
    """The place is taken."""

    errno = _errno.EEXIST


class EACCES(IommufdError):
    """A file that was not opened for this."""

    errno = _errno.EACCES


class ENODEV(IommufdError):
    """There is no such device or backing, or it has been revoked."""

    errno = _errno.ENODEV


class EINVAL(IommufdError):
    """A value that can never be right, or that does not fit the present state."""

    errno = _errno.EINVAL


class EMFILE(IommufdError):
    """No file descriptor number is left."""

    errno = _errno.EMFILE


class ENOTTY(IommufdError):
    """An ioctl number that is not served."""

    errno = _errno.ENOTTY


class ENOSPC(IommufdError):
    """No hole of the wanted size and alignment."""

    errno = _errno.ENOSPC


class ESPIPE(IommufdError):
    """A position or a count that an event queue cannot take."""

    errno = _errno.ESPIPE


class ERANGE(IommufdError):
    """Rounding to pages overflows."""

    errno = _errno.ERANGE


class EDEADLOCK(IommufdError):
    """Something does not respond to unmap requests."""

    errno = _errno.EDEADLOCK


class EBADE(IommufdError):
    """The pages pinned are not the pages expected (selftest)."""

    errno = _errno.EBADE


class EOVERFLOW(IommufdError):
    """Arithmetic on addresses wraps."""

    errno = _errno.EOVERFLOW


class EBADFD(IommufdError):
    """A file descriptor of the wrong kind."""

    errno = _errno.EBADFD


class EMSGSIZE(IommufdError):
    """The array is too short for the answer; the struct says how long it must be."""

    errno = _errno.EMSGSIZE


class EOPNOTSUPP(IommufdError):
    """A known field with an unknown value, or a feature this hardware lacks."""

    errno = _errno.EOPNOTSUPP


class EADDRINUSE(IommufdError):
    """IOVA that must be reserved is in use, or the other way round."""

    errno = _errno.EADDRINUSE


class ETIMEDOUT(IommufdError):
    """The hardware did not complete in time."""

    errno = _errno.ETIMEDOUT
