"""Unmodified programs: their system calls arrive as seccomp user notifications and are answered here.

listener.py the listener in the reactor: receive, answer
notify.py   one tree of processes: dispatch
calls.py    what each trapped system call does
target.py   processes and threads that were seen, their credentials
procmm.py   their address spaces, and the files behind shared memory (procfile.py)
status.py   what fstat shows of them
fds.py      what is installed in them, and when the last copy of it is closed
sys.py      the system calls that Python has no function for
"""
