"""The judge says what happened, and which runs must not be believed."""

import json
import shutil

import pytest
import torch

from fedsim import reconstructions
from fedsim.attack import Reconstruction
from fedsim.audit import judge
from fedsim.audit.schema import Report
from fedsim.audit.vault import Vault
from fedsim.errors import RunFailed, ScenarioError
from tests.fedsim.audit.run_folders import BATCH, CLIENTS, build

CLIP = {
    "name": "clip",
    "parameters": {"norm": 1.0},
    "changed": True,
    "cosine": 1.0,
    "norm_ratio": 0.5,
    "seconds": 0.25,
}
EXPECTED = {"defenses_expected": [{"name": "clip", "must_change": True}]}


def test_a_known_run_is_judged_as_known(tmp_path):
    report = judge(build(tmp_path / "run"))
    leak = report.leak
    assert (leak.private_examples, leak.reconstructed, leak.matched) == (32, 32, 32)
    assert leak.exact == CLIENTS * BATCH // 2
    assert leak.leaked == sum(example.leaked for example in report.examples)
    assert leak.exact <= leak.leaked < 32
    assert leak.leak_rate == leak.leaked / 32
    assert leak.interval[0] < leak.leak_rate < leak.interval[1]
    assert leak.label_accuracy == 1
    assert leak.floor.psnr.mean < leak.psnr.mean
    assert leak.curve[20].leak_rate == leak.leak_rate
    assert leak.curve[20].floor == leak.floor.leak_rate
    assert f"{leak.leaked} of 32 private images" in report.verdict
    assert "PSNR ≥ 20 dB" in report.verdict
    assert "never looks at the updates" in report.verdict
    assert (report.failed, report.stopped, report.notes) == (None, None, [])
    assert report.threat_model.used == ["updates", "basics", "manipulation"]
    assert report.federation.engine == "inline"
    assert report.classes[:2] == ["astronaut", "cat"]
    assert (report.attack.parameters_added, report.attack.bytes_added) == (1_700_000, 6_800_000)
    assert (report.attack.sent.accuracy, report.attack.sent.honest_accuracy) == (0.09, 0.11)


def test_every_private_image_has_one_row_with_its_own_match(tmp_path):
    folder = build(tmp_path / "run")
    report = judge(folder)
    assert len({(e.client, e.index) for e in report.examples}) == 32
    assert len({e.match for e in report.examples}) == 32
    candidates, _ = reconstructions.load(next((folder / "reconstructions").glob("*.safetensors")))
    vault = Vault(folder / "vault")
    for example in report.examples:
        truth = vault.record(example.client, example.round).examples[example.index].double()
        error = (candidates.examples[example.match].double() - truth).square().mean().item()
        assert example.mse == pytest.approx(error, abs=1e-12)
        assert example.label_recovered in range(10)


def test_the_report_survives_json_with_nothing_but_finite_numbers(tmp_path):
    report = judge(build(tmp_path / "run"))
    text = report.model_dump_json(by_alias=True)
    data = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert data["schema"] == "fedsim-report/1"
    assert Report.model_validate_json(text) == report


def test_lpips_without_weights_is_null_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("FEDSIM_WEIGHTS", raising=False)
    report = judge(build(tmp_path / "run"))
    assert report.leak.lpips is None
    assert "FEDSIM_WEIGHTS" in report.leak.lpips_reason
    assert all(example.lpips is None for example in report.examples)


def test_judging_twice_says_the_same(tmp_path):
    folder = build(tmp_path / "run")
    assert judge(folder) == judge(folder)


def test_an_honest_run_has_no_leak_and_says_why(tmp_path):
    folder = build(tmp_path / "run", scenario={"attack": "none"}, federation={"receipts": []})
    report = judge(folder)
    assert report.leak is None
    assert "honest" in report.leak_reason
    assert report.failed is None


def test_an_attack_without_labels_says_so(tmp_path):
    leak = judge(build(tmp_path / "run", with_labels=False)).leak
    assert leak.label_accuracy is None
    assert "no labels" in leak.label_accuracy_reason


def test_an_oracle_is_said_in_the_verdict(tmp_path):
    report = judge(build(tmp_path / "run", oracles=("labels",)))
    assert report.threat_model.oracles == ["labels"]
    assert "given the true labels by an oracle" in report.verdict


# -- receipts --------------------------------------------------------------------------------------


def test_receipts_are_summed_up_over_clients(tmp_path):
    report = judge(build(tmp_path / "run", receipts=[CLIP], federation=EXPECTED))
    part = report.defenses[0]
    assert (part.name, part.parameters) == ("clip", {"norm": 1.0})
    assert part.receipts.uploads_changed == "4/4"
    assert (part.receipts.cosine, part.receipts.norm_ratio) == (1.0, 0.5)
    assert report.failed is None


@pytest.mark.parametrize(
    ("receipts", "said"),
    [([{**CLIP, "changed": False}], "changed 0/4 uploads"), ([], "left no receipt")],
)
def test_a_defense_that_did_nothing_fails_the_run(tmp_path, receipts, said):
    report = judge(build(tmp_path / "run", receipts=receipts, federation=EXPECTED))
    assert "'clip'" in report.failed
    assert said in report.failed
    assert report.verdict.startswith("This run failed")


def test_a_detector_that_changed_no_upload_is_no_failure(tmp_path):
    told = {"defenses_expected": [{"name": "clip", "must_change": False}]}
    receipts = [{**CLIP, "changed": False}]
    assert judge(build(tmp_path / "run", receipts=receipts, federation=told)).failed is None


def test_figures_that_are_no_numbers_stay_out(tmp_path):
    receipts = [{**CLIP, "cosine": float("nan"), "norm_ratio": float("inf"), "noise_norm": 2.0}]
    part = judge(build(tmp_path / "run", receipts=receipts)).defenses[0]
    assert (part.receipts.cosine, part.receipts.norm_ratio) == (None, None)
    assert part.receipts.figures == {"noise_norm": 2.0}


def test_an_infinite_epsilon_is_null(tmp_path):
    promise = {"name": "clip", "epsilon": "inf", "delta": 1e-5, "mechanism": "none"}
    told = {**EXPECTED, "privacy": [promise]}
    part = judge(build(tmp_path / "run", receipts=[CLIP], federation=told)).defenses[0]
    assert part.epsilon.epsilon is None
    assert part.epsilon.delta == 1e-5


def test_a_manipulator_that_sent_no_modified_model_fails_the_run(tmp_path):
    told = {"receipts": ["sent a modified model to 0/4 clients in round 1"]}
    report = judge(build(tmp_path / "run", federation=told))
    assert "no client was sent a modified one" in report.failed


def test_an_attack_that_used_nothing_fails_the_run(tmp_path):
    assert "used nothing" in judge(build(tmp_path / "run", used=())).failed


def replace(folder, reconstruction):
    path = next((folder / "reconstructions").glob("*.safetensors"))
    _, facts = reconstructions.load(path)
    reconstructions.save(path.parent, reconstruction, facts)


def test_an_attack_that_returned_nothing_fails_the_run(tmp_path):
    folder = build(tmp_path / "run")
    replace(folder, Reconstruction(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64)))
    report = judge(folder)
    assert "returned no candidate" in report.failed
    assert report.leak is None


def test_an_attack_that_left_no_file_fails_the_run(tmp_path):
    folder = build(tmp_path / "run")
    shutil.rmtree(folder / "reconstructions")
    assert "left no reconstruction" in judge(folder).failed


def test_candidates_of_another_shape_cannot_be_compared(tmp_path):
    folder = build(tmp_path / "run")
    replace(folder, Reconstruction(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)))
    assert "cannot be compared" in judge(folder).leak_reason


def test_candidates_that_are_no_numbers_are_judged_as_black_and_noted(tmp_path):
    folder = build(tmp_path / "run")
    broken = torch.full((2, 3, 32, 32), float("nan"))
    replace(folder, Reconstruction(broken, torch.tensor([0, 1])))
    report = judge(folder)
    assert report.leak.leaked == 0
    assert "2 candidates hold values that are no numbers" in report.notes[0]


# -- what may be missing ---------------------------------------------------------------------------


def test_without_a_vault_the_report_says_how_to_bring_it(tmp_path):
    folder = build(tmp_path / "run", federation=EXPECTED)
    shutil.rmtree(folder / "vault")
    report = judge(folder)
    assert report.leak is None
    assert "fedsim report RUN --vault DIR" in report.leak_reason
    assert report.failed is None


def test_a_part_of_the_vault_is_judged_with_a_note(tmp_path):
    folder = build(tmp_path / "run")
    shutil.rmtree(folder / "vault/client-2")
    report = judge(folder)
    assert report.leak.private_examples == 24
    assert "client 2 in round 1" in report.notes[0]


def test_a_killed_federation_says_where_it_stopped(tmp_path):
    folder = build(tmp_path / "run", federation={"rounds": 5, "rounds_done": 2})
    report = judge(folder)
    assert "stopped after round 2 of 5" in report.stopped
    assert report.failed is None
    assert "not whole" in report.verdict


def test_a_run_killed_in_its_first_round_still_has_a_report(tmp_path):
    folder = build(tmp_path / "run")
    (folder / "federation.json").unlink()
    shutil.rmtree(folder / "reconstructions")
    (folder / "events.jsonl").write_text('{"time": 1, "event": "started"}\n{"time": 2, "ev')
    report = judge(folder)
    assert "before its first round was done" in report.stopped
    assert "'started'" in report.stopped


def test_a_run_killed_in_its_attack_says_so(tmp_path):
    folder = build(tmp_path / "run")
    shutil.rmtree(folder / "reconstructions")
    lines = (folder / "events.jsonl").read_text().splitlines()
    (folder / "events.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert "stopped before its attack was done" in judge(folder).stopped


def test_a_data_set_that_is_not_here_costs_the_floor_only(tmp_path):
    folder = build(tmp_path / "run")
    text = (folder / "scenario.toml").read_text().replace("photo-tiles", "no-such-data")
    (folder / "scenario.toml").write_text(text)
    report = judge(folder)
    assert report.leak.leaked > 0
    assert report.leak.floor is None
    assert "the data set is not here" in report.leak.floor_reason


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(RunFailed, match=r"no run folder: scenario\.toml"):
        judge(tmp_path)


def test_a_wrong_criterion_is_refused(tmp_path):
    folder = build(tmp_path / "run", scenario={"audit": {"criterion": "psnr>>20"}})
    with pytest.raises(ScenarioError, match=r"audit\.criterion"):
        judge(folder)


def test_another_saved_attack_can_be_judged_instead(tmp_path):
    folder = build(tmp_path / "run")
    path = next((folder / "reconstructions").glob("*.safetensors"))
    other = path.rename(path.with_name("other.safetensors"))
    assert judge(folder, other).leak.leaked > 0
