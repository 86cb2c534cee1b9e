"""Building the C++ fast path: once per machine, into a cache.

The library is compiled for the very CPU it runs on and kept under ``$XDG_CACHE_HOME/lowprec`` (default
``~/.cache/lowprec``) in a file named by a hash of everything that goes into it: sources, flags, compiler version, CPU
model. Processes that start together build under a lock; the finished file appears by an atomic rename, so nobody ever
loads half of one. The folder of the sources is only read, so an installed, read-only package works.

The flags leave floating point alone: no ``-ffast-math``, no flush-to-zero, no contraction to fused multiply-adds.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16")
BUILD_TIMEOUT_S = 600


class Unavailable(RuntimeError):
    """The fast path cannot run here; the message is a sentence that says why."""


def cache_folder() -> Path:
    """Where built libraries live."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowprec"


def cpu_description(needed: tuple[str, ...] = NEEDED) -> str:
    """Model and instruction sets of this CPU, as Linux reports them.

    Args:
        needed: instruction sets that must be there; with none, any CPU and system will do.

    Raises:
        Unavailable: on another system, or where an instruction set is missing.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        if not needed:
            return f"{platform.machine()} {platform.system()} {platform.processor()}"
        raise Unavailable(
            f"the C++ kernels are written for x86-64 Linux, this is {platform.machine()} {platform.system()}"
        )
    fields = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    missing = [flag for flag in needed if flag not in fields.get("flags", "").split()]
    if missing:
        raise Unavailable(f"this CPU ({fields.get('model name', 'unknown')}) lacks {', '.join(missing)}")
    return f"{fields.get('model name')} {fields.get('flags')}"


def compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, else g++, else clang++.

    Raises:
        Unavailable: if there is none.
    """
    wanted = os.environ.get("CXX")
    command = shlex.split(wanted) if wanted else next(([name] for name in ("g++", "clang++") if shutil.which(name)), [])
    if not command or not shutil.which(command[0]):
        what = f"$CXX is {wanted!r}, which is no program" if wanted else "neither g++ nor clang++ is on the PATH"
        raise Unavailable(f"no C++ compiler: {what}; install g++ to get the fast CPU kernels")
    return command


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the C++ compiler could not be run: {error}") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise Unavailable(f"`{' '.join(command)}` failed: {errors[0] if errors else f'exit code {done.returncode}'}")
    return done.stdout


def build(
    main: str = "api.cpp", flags: tuple[str, ...] = FLAGS, needed: tuple[str, ...] = NEEDED, headers: str = "[!q]*.h"
) -> Path:
    """Path of the library for this machine, built now if the cache has none.

    Args:
        main: its source file. flags: of the compiler. needed: instruction sets it cannot do without. headers: pattern
            of the files it includes.

    Raises:
        Unavailable: if the CPU, the compiler or the cache folder does not allow it.
    """
    cpu, command = cpu_description(needed), compiler()
    sources = [*sorted(SOURCES.glob(headers)), SOURCES / main]
    key = hashlib.sha256("\0".join((cpu, _run([*command, "--version"]), *command, *flags)).encode())
    for source in sources:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    target = cache_folder() / f"{'cpu' if main == 'api.cpp' else Path(main).stem}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                    fresh = Path(folder) / target.name
                    _run([*command, *flags, str(SOURCES / main), "-o", str(fresh)])
                    os.replace(fresh, target)
    except OSError as error:
        raise Unavailable(
            f"the cache folder {target.parent} cannot be used ({error}); set XDG_CACHE_HOME to a writable one"
        ) from error
    return target


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the sentence why there is none. Tried once per process."""
    try:
        library = ctypes.CDLL(str(build()))
        if not library.lowprec_supported():
            raise Unavailable(
                "the C++ compiler does not target this CPU's AVX512-VNNI and AVX512-BF16 with -march=native"
            )
    except (Unavailable, OSError) as error:
        return None, str(error)
    return library, ""
