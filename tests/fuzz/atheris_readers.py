"""Coverage-guided fuzzing of one target: `python -m tests.fuzz.atheris_readers TARGET SECONDS`."""

import sys

import atheris

with atheris.instrument_imports(include=["isthmus"]):
    from tests.fuzz import targets


def main(name: str, seconds: int) -> None:
    target = next(target for target in targets.TARGETS if target.__name__ == name)
    # The peak of resident memory is inherited from the test runner, so only single allocations are limited.
    limits = ("-max_len=512", "-rss_limit_mb=0", "-malloc_limit_mb=1024")
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", *limits], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
