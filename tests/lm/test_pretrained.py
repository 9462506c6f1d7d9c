"""By what a pretrained model is known."""

import hashlib
import shutil
from pathlib import Path

from saelab.lm.pretrained import fingerprint
from tests.tiny import model_folder


def test_a_models_fingerprint_is_of_its_content_wherever_it_lies(tmp_path: Path) -> None:
    folder = model_folder("gpt2")
    copied = Path(shutil.copytree(folder, tmp_path / "checkpoints" / "snapshots" / "last"))
    assert fingerprint(copied) == fingerprint(folder)
    weights = copied / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(copied) != fingerprint(folder)


def test_a_models_fingerprint_takes_the_hubs_word_for_a_large_file(tmp_path: Path) -> None:
    folder, cached = model_folder("gpt2"), tmp_path / "models--someone--model"
    snapshot, blobs = cached / "snapshots" / "a94a8fe5", cached / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():  # as the Hub's client lays them: small files have another kind of name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = blobs / (digest if path.suffix == ".safetensors" else digest[:40])
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    assert fingerprint(snapshot) == fingerprint(folder)
    (snapshot / "model.safetensors").resolve().write_bytes(b"never read")
    assert fingerprint(snapshot) == fingerprint(folder)
