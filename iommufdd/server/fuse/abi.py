"""include/uapi/linux/fuse.h: the requests that reach a file system of one regular file, and their replies."""

import struct

KERNEL_VERSION = 7
MINOR_VERSION = 40  # what is used here: FOPEN_PASSTHROUGH

FORGET = 2
GETATTR = 3
SETATTR = 4
OPEN = 14
READ = 15
WRITE = 16
STATFS = 17
RELEASE = 18
FSYNC = 20
FLUSH = 25
INIT = 26
INTERRUPT = 36
DESTROY = 38
IOCTL = 39
POLL = 40
BATCH_FORGET = 42
FALLOCATE = 43

NOTIFY_POLL = 1

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("<IiQ")  # len, error, unique

INIT_IN = struct.Struct("<IIII")  # major, minor, max_readahead, flags
INIT_IN_FLAGS2 = struct.Struct("<16xI")  # what follows, if flags have INIT_EXT
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
# map_alignment, flags2, max_stack_depth, request_timeout
INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
# ino, size, blocks, atime, mtime, ctime, and their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
ATTR = struct.Struct("<6Q10I")
ATTR_OUT = struct.Struct("<QII")  # attr_valid, attr_valid_nsec, dummy; then ATTR
SETATTR_IN = struct.Struct("<I")  # valid
OPEN_OUT = struct.Struct("<QIi")  # fh, open_flags, backing_id
RELEASE_IN = struct.Struct("<Q")  # fh
READ_IN = WRITE_IN = struct.Struct("<QQIIQII")  # fh, offset, size, flags, lock_owner, flags, padding
WRITE_OUT = struct.Struct("<II")  # size, padding
IOCTL_IN = struct.Struct("<QIIQII")  # fh, flags, cmd, arg, in_size, out_size
IOCTL_OUT = struct.Struct("<iIII")  # result, flags, in_iovs, out_iovs
POLL_IN = struct.Struct("<QQII")  # fh, kh, flags, events
POLL_OUT = struct.Struct("<II")  # revents, padding
POLL_WAKEUP_OUT = struct.Struct("<Q")  # kh
STATFS_OUT = struct.Struct("<5Q10I")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding, spare

INIT_ATOMIC_O_TRUNC = 1 << 3
INIT_EXT = 1 << 30
INIT2_PASSTHROUGH = 1 << 37 - 32
FOPEN_DIRECT_IO = 1 << 0
FOPEN_STREAM = 1 << 4
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FOPEN_PASSTHROUGH = 1 << 7
FATTR_OWNER_MODE = 0b111  # FATTR_MODE, FATTR_UID, FATTR_GID
FATTR_SIZE = 1 << 3
IOCTL_COMPAT = 1 << 0
POLL_SCHEDULE_NOTIFY = 1 << 0

DEV_IOC_BACKING_OPEN = 0x4010_E501
BACKING_MAP = struct.Struct("<iIQ")  # fd, flags, padding

ROOT_INO = 1
S_IFREG = 0o100000
MAX_WRITE = 1 << 16  # bytes of one WRITE: whole responses of a fault queue
MIN_READ_BUFFER = 8192
REQUEST_ROOM = 4096 + MAX_WRITE  # what must be offered for a request
