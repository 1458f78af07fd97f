"""How programs of one launch hand over: each leaves its part in scratch memory, the last to arrive adds them up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last_to_arrive(counter_ptr, num_programs):
    """Count this program and publish what it stored; true in the last of `num_programs`, which may read all parts.

    - The barrier: every thread's stores come before the arrival, which one thread does.
    - acq_rel: the arrival releases this program's stores, and acquires those of the programs that arrived before.
    - The last one leaves the counter at zero, as it was found: the next launch, or replay, counts from there.

    Parts must be loaded with cache_modifier=".cg": from the second-level cache, where other programs' stores are.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last
