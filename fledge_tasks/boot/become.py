"""A program of 246 bytes that becomes another user and runs another program: `become IDS PROGRAM ARGV0 [ARGUMENT...]`.

IDS are a uid, a gid and any number of supplementary groups, 'UID,GID[,GROUP...]'. It calls setgroups(2),
setgid(2), setuid(2) and execve(2), and ends with 126 when it may not change the user, 127 when PROGRAM
cannot be run.

It goes into the guest for want of a tool: busybox's `su` and `start-stop-daemon` only become users that have an entry
in the image's passwd(5), and images like to name just a number.
"""

from __future__ import annotations

import struct

_ADDRESS = 0x400000
# Machine code for x86-64, the architecture of QEMU's microvm machine; system calls as in syscall(2).
_CODE = (
    ("48 89 e5", "mov  rbp, rsp            the stack is argc, argv[0], IDS, PROGRAM, ARGV0, ..."),
    ("48 81 ec 00 00 04 00", "sub  rsp, 0x40000        room for all the numbers that fit into an argument"),
    ("48 8b 75 10", "mov  rsi, [rbp+16]       IDS"),
    ("48 89 e7", "mov  rdi, rsp"),
    ("31 d2", "xor  edx, edx            number:"),
    ("ac", "lodsb                    digit:"),
    ("2c 30", "sub  al, '0'"),
    ("72 0a", "jb   store               a comma, or the end"),
    ("0f b6 c0", "movzx eax, al"),
    ("6b d2 0a", "imul edx, edx, 10"),
    ("01 c2", "add  edx, eax"),
    ("eb f1", "jmp  digit"),
    ("89 17", "mov  [rdi], edx          store:"),
    ("48 83 c7 04", "add  rdi, 4"),
    ("3c fc", "cmp  al, ',' - '0'"),
    ("74 e5", "je   number"),
    ("48 8d 74 24 08", "lea  rsi, [rsp+8]        setgroups(count, groups)"),
    ("48 29 f7", "sub  rdi, rsi"),
    ("c1 ef 02", "shr  edi, 2"),
    ("6a 74", "push 116"),
    ("e8 33 00 00 00", "call set"),
    ("8b 7c 24 04", "mov  edi, [rsp+4]        setgid(gid)"),
    ("6a 6a", "push 106"),
    ("e8 28 00 00 00", "call set"),
    ("8b 3c 24", "mov  edi, [rsp]          setuid(uid)"),
    ("6a 69", "push 105"),
    ("e8 1e 00 00 00", "call set"),
    ("48 8b 7d 18", "mov  rdi, [rbp+24]       execve(PROGRAM, argv + 3, envp)"),
    ("48 8d 75 20", "lea  rsi, [rbp+32]"),
    ("48 8b 45 00", "mov  rax, [rbp]"),
    ("48 8d 54 c5 10", "lea  rdx, [rbp+rax*8+16]"),
    ("6a 3b", "push 59"),
    ("58", "pop  rax"),
    ("0f 05", "syscall"),
    ("6a 7f", "push 127"),
    ("5f", "pop  rdi"),
    ("6a 3c", "push 60                  exit:"),
    ("58", "pop  rax"),
    ("0f 05", "syscall"),
    ("59", "pop  rcx                 set: the return address, and the number of the call"),
    ("58", "pop  rax"),
    ("51", "push rcx"),
    ("0f 05", "syscall"),
    ("6a 7e", "push 126"),
    ("5f", "pop  rdi"),
    ("85 c0", "test eax, eax"),
    ("75 ef", "jnz  exit"),
    ("c3", "ret"),
)


def program() -> bytes:
    """Return the program as a static ELF file for x86-64 (elf(5)): a header, one segment, the code."""
    code = b"".join(bytes.fromhex(octets) for octets, _ in _CODE)
    size = 64 + 56 + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, _ADDRESS + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _ADDRESS, _ADDRESS, size, size, 0x1000)
    return header + segment + code
