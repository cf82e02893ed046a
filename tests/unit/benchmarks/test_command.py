import json
import subprocess
import sys

from benchmarks.harness.running import ROOT


def test_a_quick_run_of_one_claim_measures_it_beside_its_floors_and_judges_its_promise(tmp_path):
    results = tmp_path / "results.json"
    claim = ["--quick", "--no-peers", "--only", "hot", "--json", str(results)]
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks", *claim],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr + answer.stdout
    document = json.loads(results.read_text("utf-8"))
    assert document["cells"]["hot.call_us"]["count"] > 0
    assert document["cells"]["floors.socket_round_trip_us"]["count"] > 0
    outcomes = {row["id"]: row["outcome"] for row in document["promises"]}
    assert outcomes["hot-call"] in ("met", "missed")
    assert outcomes["warm-call"] == "unmeasured"
    assert document["litter"] == {}
    assert "hot no-op Python call, same node, 1 B" in answer.stdout
