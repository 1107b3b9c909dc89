"""/dev/iommu as a file that is mounted over a path (`iommufdctl mount`): the second way in for unmodified programs.

A FUSE file system whose root is one regular file. The kernel sends an ioctl with its number, its raw argument and the
caller's thread; memory is read and written as in server/seccomp/, whose rooms for processes serve here too.

session.py  the /dev/fuse descriptor in the reactor: requests and replies
calls.py    what each request does
files.py    what is open, and the descriptor table of a caller
caller.py   who calls
inject.py   descriptors for callers: the calling thread is made to open the file again (ptrace.py)
backing.py  the file behind mappings, where the kernel takes one
exact.py    the calls that never reach a FUSE file, by a seccomp listener (`mount --exact`)
identity.py which open file a descriptor shows
abi.py      include/uapi/linux/fuse.h
"""
