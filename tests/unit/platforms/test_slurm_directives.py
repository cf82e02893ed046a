"""`#ISTHMUS` lines of batch scripts, and where a script stands among sbatch's words."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cli.failures import Failure
from isthmus.cli.submitting import script_place
from isthmus.platforms.slurm import parsing
from isthmus.platforms.slurm.directives import DirectiveError, Lend, lend_of

HEADER = "#!/usr/bin/env python3\n#SBATCH -c2\n"


def test_a_line_in_the_header_says_what_is_lent():
    assert lend_of(f"{HEADER}#ISTHMUS lend cores=2 memory=1GiB\nprint()\n") == Lend(
        line=3, cores="2", memory="1GiB"
    )
    assert lend_of(f"{HEADER}\n#ISTHMUS lend\n") == Lend(line=4)
    assert lend_of(f"{HEADER}# ISTHMUS lend\n#ISTHMUSX\necho '#ISTHMUS'\n") is None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("#ISTHMUS lend core=2", "line 3: 'core=2' is not known"),
        ("#ISTHMUS borrow", "line 3: #ISTHMUS borrow is not known"),
        ("#ISTHMUS lend cores=none", "line 3: cores=none is neither"),
        ("#ISTHMUS lend memory=much", "line 3: memory: "),
        ("#ISTHMUS lend cores=1 cores=2", "line 3: cores is there twice"),
        ("#ISTHMUS lend\n#ISTHMUS lend", "line 4: line 3 says already"),
        ("sleep 1\n#ISTHMUS lend", "line 4: #ISTHMUS lines stand before the first command"),
    ],
)
def test_a_mistaken_line_is_refused_with_its_number(lines, words):
    with pytest.raises(DirectiveError, match=f"^{words}"):
        lend_of(f"{HEADER}{lines}\n")


@given(script=st.text() | st.text().map(lambda text: f"#ISTHMUS lend {text}"))
def test_any_script_has_a_meaning_or_the_typed_error(script):
    with contextlib.suppress(DirectiveError):
        found = lend_of(script)
        assert found is None or found.line >= 1


@pytest.mark.parametrize(
    ("words", "script"),
    [
        ("job.sh -x y", 0),
        ("-p batch -c2 job.sh", 3),
        ("--partition batch --mem=1G --exclusive job.sh job.sh", 4),
        ("-HQp batch -W job.sh", 3),
    ],
)
def test_the_script_is_found_behind_options_and_their_values(words, script):
    assert script_place(words.split()) == script


@pytest.mark.parametrize("words", ["--wrap=hostname", "-p batch", ""])
def test_without_a_script_it_says_so(words):
    with pytest.raises(Failure, match="name the script"):
        script_place(words.split())


def test_a_batch_job_is_described():
    text = (
        "JobId=42 JobName=my job UserId=a(1) Account=(null) QOS=low JobState=RUNNING NumNodes=2 NumCPUs=4 "
        "ReqTRES=cpu=4,mem=2G,node=2 AllocTRES=cpu=4,mem=600M,node=2 Command=/x"
    )
    job = parsing.batch_job(42, text)
    assert (job.name, job.account, job.qos, job.nodes, job.memory_bytes) == (
        "my job", "", "low", 2, 600 * 2**20,
    )  # fmt: skip
