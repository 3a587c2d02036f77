import platform

import pytest

from netsmith.train.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep it anyway")
def test_what_is_freed_is_used_again():
    import resource

    keep_freed_memory()
    bytearray(64 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100  # of 16,384 pages
