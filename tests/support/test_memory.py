"""What was freed goes back to the system, also where it lies between memory that stays in use."""

import ctypes

import pytest

from skipkernels.support.memory import give_back_freed_memory
from tests.processes import resident_bytes

PIECE, PIECES = 20_000, 5_000  # bytes far below those that malloc maps, which go back by themselves


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs the GNU C library")
def test_freed_pieces_between_used_ones_go_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    give_back_freed_memory()
    pieces, between = [], []
    for _ in range(PIECES):
        pieces.append(libc.malloc(PIECE))
        between.append(libc.malloc(64))
        ctypes.memset(pieces[-1], 1, PIECE)
    for piece in pieces:
        libc.free(piece)
    before = resident_bytes()
    give_back_freed_memory()
    gone = before - resident_bytes()
    for piece in between:
        libc.free(piece)
    assert gone > 0.8 * PIECE * PIECES, f"{gone} of {PIECE * PIECES} bytes went back"
