"""A decoder's blocks on llama.cpp: vectors in, hidden states out. Keys and values stay in llama.cpp.

Calls llama.cpp's C functions as llama-cpp-python declares them. The context is created for the first sequence and again
for a longer one, so that its memory depends on actual prompts and not on the longest possible one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.inference.decode import NoAction

ENGINE = "llama-cpp-python"
NEEDS = {ENGINE: ">=0.3.36"}
SPINS = "1000"
"""How often OpenMP's threads poll at a barrier before they sleep. The default of 300,000 takes milliseconds at each of
hundreds of barriers if another process uses one of the cores: 230 ms per token instead of 8."""
ROUND = 256  # llama.cpp rounds contexts up to this many positions
ERROR, CONTINUED = 4, 5  # ggml_log_level

_loaded: ModuleType | None = None
_errors: list[str] = []


def library() -> ModuleType:
    """llama.cpp without log output. Raises UserError if llama-cpp-python is missing or does not load."""
    global _loaded
    if _loaded is None:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when the library is loaded
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: a damaged shared library
            raise UserError(
                f"expected llama-cpp-python on this machine, found: {' '.join(str(error).split())}; "
                "make gguf builds it for this processor, or pip install rlrc[gguf]"
            ) from None
        llama_cpp.llama_log_set(_LOG, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _loaded = llama_cpp
    return _loaded


def _keep_errors(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        _errors.append(text.decode(errors="replace").strip())
        del _errors[:-3]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_keep_errors)  # kept: llama.cpp calls it


def last_errors() -> str:
    """llama.cpp's last error messages."""
    found = "; ".join(_errors) or "no reason given"
    _errors.clear()
    return found


class LlamaModel:
    """A model file and its current sequence of ``length`` positions.

    ``precision``: the file's. With "fp32", attention is computed in fp32 too; with any other, keys and values are
    float16, which rounds no more than the matrix products do. ``causal``: positions do not attend to later ones.
    """

    def __init__(self, path: Path, width: int, precision: str, causal: bool, threads: int) -> None:
        self._lib, self._width, self._threads, self._causal = library(), width, threads, causal
        self._exact = precision == "fp32"
        params = self._lib.llama_model_default_params()
        if precision == "q4_k_m" and platform.machine() == "x86_64":
            params.use_extra_bufts = False  # repacked weights, good for other formats, take 1.7 times as long here
        if precision == "int4":  # weights are repacked for the kernels; a mapped file would stay in memory too
            params.load_mode = self._lib.LLAMA_LOAD_MODE_NONE
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise UserError(f"expected a model that llama.cpp loads, found {path}: {last_errors()}; export it again")
        weakref.finalize(self, self._lib.llama_model_free, self._model)
        found = self._lib.llama_model_n_embd(self._model)
        if found != width:
            raise UserError(f"expected vectors of {width} in {path}, found {found}; export it again")
        self._context: Any = None
        self._room = self.length = 0

    def begin(self, length: int) -> None:
        """Starts a new sequence of up to ``length`` positions."""
        if length > self._room:
            self._open(-(-length // ROUND) * ROUND)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        self.length = 0

    def run(self, x: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
        """Continues the sequence with x (T, width) -> normalised hidden states of the last positions (rows, width).

        Without ``causal``, the T positions attend to each other and to all before. Raises NoAction if llama.cpp fails.
        """
        x = np.ascontiguousarray(x, np.float32)
        if not 0 < len(x) <= self._room - self.length or x.shape[1] != self._width:
            raise NoAction(
                f"expected up to {self._room - self.length} vectors of {self._width} for the decoder, found {x.shape}"
            )
        batch = self._lib.llama_batch(n_tokens=len(x), embd=x.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
        status = self._lib.llama_decode(self._context, batch)
        if status:
            self.length = 0  # the cache is in an unknown state: the next pass must start a new sequence
            raise NoAction(f"llama.cpp failed with status {status}: {last_errors()}")
        self.length += len(x)
        embeddings = self._lib.llama_get_embeddings(self._context)
        hidden: NDArray[np.float32] = np.ctypeslib.as_array(embeddings, (len(x), self._width))[-rows:].copy()
        return hidden

    def _open(self, length: int) -> None:
        self.close()
        lib, params = self._lib, self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length  # a batch that is not causal cannot be split
        params.n_threads = params.n_threads_batch = self._threads
        params.attention_type = lib.LLAMA_ATTENTION_TYPE_CAUSAL if self._causal else lib.LLAMA_ATTENTION_TYPE_NON_CAUSAL
        params.embeddings, params.pooling_type = True, lib.LLAMA_POOLING_TYPE_NONE
        if self._exact:
            params.flash_attn_type, params.type_k = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED, lib.GGML_TYPE_F32
        else:
            params.flash_attn_type, params.type_k = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.GGML_TYPE_F16
        params.type_v = params.type_k
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise NoAction(f"llama.cpp cannot create a context for {length} positions: {last_errors()}")
        self._context, self._room = context, length
        self._freed = weakref.finalize(self, lib.llama_free, context)

    def close(self) -> None:
        """Frees the context; the next sequence creates another."""
        if self._context:
            self._freed()
        self._context, self._room = None, 0


def quantize(source: Path, out: Path, file_type: int) -> None:
    """Quantizes a model file with llama.cpp. Raises UserError if that fails."""
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    if lib.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise UserError(f"expected {source} to be quantized, found: {last_errors()}; use another --precision")
