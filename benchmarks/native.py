"""Claim: a hot native (C ABI) function costs at most 350 ns more than the raw UCX round trip.

channel  one call on the bare channel: what the fabric adds
call     `site.call` of the same function: what the client's Python adds on top
The function is compiled here with the C compiler of the machine; without one there is nothing to measure.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

import isthmus
from benchmarks.harness.sites import FUNCTION_ID, bare_channel, define_native, site_for
from benchmarks.harness.subject import Cells, run

_SOURCE = """
#include <stdint.h>
int32_t echo(const void *arguments, uint64_t arguments_bytes, void *result, uint64_t *result_bytes) {
    if (arguments_bytes > *result_bytes) return 1;
    for (uint64_t i = 0; i < arguments_bytes; i++) ((char *)result)[i] = ((const char *)arguments)[i];
    *result_bytes = arguments_bytes;
    return 0;
}
"""


def measure(cells: Cells) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        cells.notes.append("not measured: no C compiler")
        return
    library = str(build(compiler))
    echo = isthmus.native(library, "echo")
    with site_for(cells) as site:
        if site.call(echo, b"x") != b"x":
            raise RuntimeError("the native function did not echo its byte")
        cells.latency("call_us", site.call, echo, b"x")
    with bare_channel(cells) as (_, channel):
        define_native(channel, library, "echo")
        cells.latency("channel_us", channel.call, 1, FUNCTION_ID, b"x", (), 0, 0.001, 1.0)


def build(compiler: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    (folder / "echo.c").write_text(_SOURCE)
    library = folder / "echo.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, folder / "echo.c"], check=True)
    return library


if __name__ == "__main__":
    run("native", measure)
