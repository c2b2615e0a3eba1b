"""One instance of bn.cu as machine code, compiled on first use, with a cache on disk that can't fail a call.

NVRTC is called itself. cupy.RawModule appends -ftz=true, under which float32 subnormals are 0, and asks for the CUDA
headers, which are often not installed and which bn.cu does without.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from cupy.cuda import nvrtc

from .launches import COMPILE_OPTIONS, source

_log = logging.getLogger(__name__)


def machine_code(expression: str, options: tuple[str, ...], capability: tuple[int, int]) -> tuple[bytes, str]:
    """The code of `expression` (a C++ name) for a compute capability, and the name of the kernel in it.

    A file holds a checksum, the name and the code. Whatever goes wrong around it means: compile again.
    """
    options = (*COMPILE_OPTIONS, *options, f"--gpu-architecture={_target(capability)}")
    key = repr((source(), expression, options, nvrtc.getVersion())).encode()
    name = hashlib.sha256(key).hexdigest()[:32] + ".cubin"
    try:
        content = (cache_folder() / name).read_bytes()
        kernel, _, code = content[32:].partition(b"\0")
        if content[:32] == _checksum(name, content[32:]):
            return code, kernel.decode()
        _log.debug("%s is damaged", name)
    except FileNotFoundError:
        pass
    except Exception as cause:  # no home, no permission
        _log.debug("%s isn't loaded: %r", name, cause)
    code, lowered = _compile(expression, options)
    try:
        _save(cache_folder(), name, lowered.encode() + b"\0" + code)
    except Exception as cause:  # no folder, no space, no permission
        _log.debug("%s isn't saved: %r", name, cause)
    return code, lowered


def cache_folder() -> Path:
    """FASTBN_CACHE_DIR, or `fastbn` in the user's cache folder."""
    if given := os.environ.get("FASTBN_CACHE_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "fastbn"


def _save(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.{os.urandom(8).hex()}.tmp"  # so that others see no file or all of it
    try:
        part.write_bytes(_checksum(name, content) + content)
        os.replace(part, folder / name)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()


def _target(capability: tuple[int, int]) -> str:
    """sm_90 for (9, 0); for a device that NVRTC is too old for, PTX, which the driver compiles when it is loaded."""
    wanted = 10 * capability[0] + capability[1]
    known = nvrtc.getSupportedArchs()
    if wanted in known:
        return f"sm_{wanted}"
    older = [arch for arch in known if arch < wanted]
    if not older:
        raise RuntimeError(
            f"fastbn: NVRTC {'.'.join(map(str, nvrtc.getVersion()))} compiles for compute capability "
            f"{min(known) / 10} or newer, this GPU has {wanted / 10}. Install an older cupy-cuda package"
        )
    return f"compute_{max(older)}"


def _compile(expression: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    program = nvrtc.createProgram(source(), "bn.cu", (), ())
    try:
        nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as cause:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"fastbn: {expression} can't be compiled with {' '.join(options)}:\n{log}") from cause
        code = nvrtc.getCUBIN(program) if "=sm_" in options[-1] else nvrtc.getPTX(program)
        return code, nvrtc.getLoweredName(program, expression)
    finally:
        nvrtc.destroyProgram(program)
