"""The vault gives back what was put in, to the auditor and to nobody else."""

import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file

from fedsim.audit import judge, sealing
from fedsim.audit.vault import Vault, VaultRecord, collect, deposit
from fedsim.data import Split
from fedsim.errors import RunFailed
from tests.fedsim.small import federated


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDSIM_AUDITOR_PUBLIC_KEY", raising=False)
    monkeypatch.delenv("FEDSIM_AUDITOR_KEY_FILE", raising=False)
    return tmp_path / "home"


def record(client=3, server_round=1, count=4, **more):
    generator = torch.Generator().manual_seed(client * 100 + server_round)
    return VaultRecord(
        client=client,
        round=server_round,
        examples=torch.rand(count, 3, 8, 8, generator=generator),
        labels=torch.arange(count) % 2,
        indices=torch.arange(count) + 10,
        **more,
    )


def test_the_auditor_gets_back_exactly_what_a_client_deposited(tmp_path):
    receipts = [{"name": "clip", "parameters": {"norm": 1.0}, "changed": True, "cosine": 1.0}]
    upload = {"weight": torch.randn(5, 2)}
    put = record(receipts=receipts, upload=upload, checks={"bars": 0.25})
    deposit(tmp_path / "vault", put)
    got = Vault(tmp_path / "vault").record(3, 1)
    assert torch.equal(got.examples, put.examples)
    assert torch.equal(got.labels, put.labels)
    assert torch.equal(got.indices, put.indices)
    assert got.receipts == receipts
    assert got.upload.keys() == upload.keys()
    assert torch.equal(got.upload["weight"], upload["weight"])
    assert (got.client, got.round, got.refused, got.checks) == (3, 1, None, {"bars": 0.25})


def test_pixels_of_8_bits_come_back_as_double_precision_trains_on_them(tmp_path):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    one = torch.zeros(1, dtype=torch.int64)
    deposit(tmp_path / "vault", VaultRecord(0, 1, pixels, labels=one, indices=one.clone()))
    got = Vault(tmp_path / "vault").record(0, 1)
    assert torch.equal(got.examples, Split(pixels, one).batch(one, torch.float64)[0])


def test_double_precision_is_judged_beyond_that_of_single(tmp_path):
    """Against a truth in float32 nothing could come nearer than some 156 dB."""
    changes = {
        "attack": "linear-inversion",
        "data.dataset": "photo-tiles",
        "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        "federation.precision": "float64",
        "model.name": "mlp(hidden=[32])",
    }
    judged = judge(federated(tmp_path, changes).folder.path)
    assert min(example.psnr for example in judged.examples) > 190


def test_a_refusal_is_deposited_without_examples_or_upload(tmp_path):
    deposit(tmp_path / "vault", record(count=0, refused="bars 0.98"))
    got = Vault(tmp_path / "vault").record(3, 1)
    assert got.refused == "bars 0.98"
    assert got.upload is None
    assert got.examples.shape == (0, 3, 8, 8)


def test_records_come_in_order_of_client_and_round_as_numbers(tmp_path):
    for key in [(10, 1), (2, 11), (2, 2)]:
        deposit(tmp_path / "vault", record(*key))
    vault = Vault(tmp_path / "vault")
    assert [(r.client, r.round) for r in vault] == [(2, 2), (2, 11), (10, 1)]
    assert vault.record(2, 3) is None


def test_vault_folders_and_files_are_for_their_owner_only(tmp_path):
    path = deposit(tmp_path / "vault", record())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(sealing.key_path().stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_deposit_is_no_safetensors_and_shows_no_pixel(tmp_path):
    put = VaultRecord(1, 1, torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2))
    path = deposit(tmp_path / "vault", put)
    content = path.read_bytes()
    assert b"examples" not in content
    assert bytes(64) not in content
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        load_file(path)


def test_equal_deposits_look_different_on_disk(tmp_path):
    first = deposit(tmp_path / "a", record()).read_bytes()
    assert deposit(tmp_path / "b", record()).read_bytes() != first


@pytest.mark.parametrize("at", [0, 20, 60, -1])
def test_a_changed_deposit_does_not_open(tmp_path, at):
    path = deposit(tmp_path / "vault", record())
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFailed, match="client-3/round-1 does not open"):
        Vault(tmp_path / "vault").record(3, 1)


def test_a_deposit_moved_to_another_client_does_not_open(tmp_path):
    path = deposit(tmp_path / "vault", record(3))
    (tmp_path / "vault/client-4").mkdir()
    shutil.copy(path, tmp_path / "vault/client-4/round-1.sealed")
    with pytest.raises(RunFailed, match="client-4/round-1 does not open"):
        Vault(tmp_path / "vault").record(4, 1)


def test_another_auditors_key_does_not_open_it(tmp_path, monkeypatch):
    deposit(tmp_path / "vault", record())
    monkeypatch.setenv("FEDSIM_AUDITOR_KEY_FILE", str(tmp_path / "other.key"))
    with pytest.raises(RunFailed, match=r"another auditor's key.*other\.key"):
        Vault(tmp_path / "vault").record(3, 1)


def test_a_client_needs_only_the_public_key(tmp_path, monkeypatch, home):
    public = sealing.public_key().hex()
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "supernode"))
    monkeypatch.setenv("FEDSIM_AUDITOR_PUBLIC_KEY", public)
    deposit(tmp_path / "vault", record())
    assert not (tmp_path / "supernode").exists()
    monkeypatch.setenv("FEDSIM_HOME", str(home))
    assert Vault(tmp_path / "vault").record(3, 1) is not None


def test_the_public_half_alone_in_home_serves_a_client_too(tmp_path, monkeypatch, home):
    sealing.public_key()
    node = tmp_path / "supernode"
    node.mkdir()
    shutil.copy(home / "auditor.pub", node)
    monkeypatch.setenv("FEDSIM_HOME", str(node))
    deposit(tmp_path / "vault", record())
    assert not (node / "auditor.key").exists()
    monkeypatch.setenv("FEDSIM_HOME", str(home))
    assert len(list(Vault(tmp_path / "vault"))) == 1


@pytest.mark.parametrize("text", ["abc", "zz" * 32, "00" * 31])
def test_a_wrong_public_key_says_what_is_wanted(monkeypatch, text):
    monkeypatch.setenv("FEDSIM_AUDITOR_PUBLIC_KEY", text)
    with pytest.raises(RunFailed, match="64 hex digits"):
        sealing.public_key()


def test_collecting_brings_deposits_together_once(tmp_path):
    deposit(tmp_path / "node-1/vault", record(1))
    deposit(tmp_path / "node-2", record(2))
    into = tmp_path / "run/vault"
    assert collect([tmp_path / "node-1", tmp_path / "node-2"], into) == 2
    assert collect([tmp_path / "node-1", tmp_path / "node-2"], into) == 0
    assert [r.client for r in Vault(into)] == [1, 2]


def test_collecting_accepts_the_same_deposit_sealed_twice(tmp_path):
    deposit(tmp_path / "node-1", record(1))
    deposit(tmp_path / "run/vault", record(1))
    assert collect([tmp_path / "node-1"], tmp_path / "run/vault") == 0


def test_collecting_never_overwrites_what_contradicts_it(tmp_path):
    deposit(tmp_path / "node-1", record(1, count=2))
    path = deposit(tmp_path / "run/vault", record(1, count=4))
    before = path.read_bytes()
    with pytest.raises(RunFailed, match="disagree about client-1/round-1"):
        collect([tmp_path / "node-1"], tmp_path / "run/vault")
    assert path.read_bytes() == before


def test_collecting_from_a_folder_without_deposits_says_so(tmp_path):
    with pytest.raises(RunFailed, match="is no vault"):
        collect([tmp_path], tmp_path / "run/vault")


def test_a_deposit_needs_a_label_for_every_example(tmp_path):
    wrong = VaultRecord(1, 1, torch.zeros(2, 1, 4, 4), torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match="one label"):
        deposit(tmp_path, wrong)
