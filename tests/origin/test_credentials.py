"""Content credentials: what is signed is read again, every change shows, keys are what they are."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from multimodal.cli import main
from multimodal.origin.credentials import (
    CERTIFICATES,
    KEY,
    PARTLY_DRAWN,
    SELF_MADE,
    Drawing,
    Signer,
    _finding,
    find_credentials,
    make_signer,
    read_credentials,
)

PROMPT = "a red circle, ünder a tree"
DIGEST = hashlib.sha256(PROMPT.encode()).hexdigest()
KINDS = ("PNG", "JPEG", "WEBP")
PICTURE = Image.effect_noise((64, 48), 60).convert("RGB")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return make_signer(tmp_path_factory.mktemp("keys") / "keys")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_signed_is_read_again(signer: Signer, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "drawing"
    file.write_bytes(signer.sign(PICTURE, kind, Drawing.of("0123abcd", PROMPT)))
    found = read_credentials(file)
    assert found.state == "valid"
    assert found.drawing == {"model": "0123abcd", "prompt_sha256": DIGEST}
    assert found.actions == ("c2pa.created",)
    assert found.source_types == ("trainedAlgorithmicMedia",)
    assert SELF_MADE in found.signer
    assert any("anyone can make such a key" in line for line in found.lines())
    if kind == "PNG":  # not a pixel differs
        assert Image.open(file).convert("RGB").tobytes() == PICTURE.tobytes()


def test_the_manifest_is_that_of_the_standard(signer: Signer, tmp_path: Path) -> None:
    """Read by c2pa itself, not by our reader."""
    file = tmp_path / "edited.png"
    file.write_bytes(signer.sign(PICTURE, "PNG", Drawing.of("0123abcd", PROMPT, PARTLY_DRAWN)))
    report = json.loads(c2pa.Reader(str(file)).json())
    (manifest,) = report["manifests"].values()
    (actions,) = [a for a in manifest["assertions"] if a["label"].startswith("c2pa.actions")]
    (action,) = actions["data"]["actions"]
    types = "http://cv.iptc.org/newscodes/digitalsourcetype/"
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"] == types + "compositeWithTrainedAlgorithmicMedia"
    assert PROMPT not in json.dumps(report, ensure_ascii=False), "only its digest is told"


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_one_bit_shows_wherever_it_is(signer: Signer, kind: str) -> None:
    data = signer.sign(PICTURE, kind, Drawing.of("0123abcd", PROMPT))
    mime = f"image/{kind.lower()}"
    pixels = {"PNG": b"IDAT", "JPEG": b"\xff\xda", "WEBP": b"VP8 "}[kind]
    places = [data.rindex(pixels) + 60, data.index(b"0123abcd"), data.index(DIGEST.encode())]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        found = find_credentials(bytes(changed), mime)
        assert found.state == "changed" and found.problems, place
        assert found.lines()[0].startswith("CHANGED")
    assert find_credentials(data[:-60], mime).state == "changed"


def test_pixels_saved_again_have_no_credentials(signer: Signer, tmp_path: Path) -> None:
    file = tmp_path / "drawing.png"
    file.write_bytes(signer.sign(PICTURE, "PNG", Drawing.of("0123abcd", PROMPT)))
    Image.open(file).save(tmp_path / "again.png")
    assert read_credentials(tmp_path / "again.png").state == "none"


def _issued(name: str, key: object, issuer: x509.Name, by: object, is_ca: bool) -> x509.Certificate:
    now = datetime.now(UTC)
    usages = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    ).split()
    usage = {each: (each == ("key_cert_sign" if is_ca else "digital_signature")) for each in usages}
    public = key.public_key()
    builder = x509.CertificateBuilder(
        issuer, _name(name), public, x509.random_serial_number(), now, now + timedelta(days=9)
    )
    builder = builder.add_extension(x509.BasicConstraints(is_ca, None), True)
    builder = builder.add_extension(x509.KeyUsage(**usage), True)
    if not is_ca:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
    return builder.add_extension(above, False).sign(by, hashes.SHA256())


def _name(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("sort", ["P-256", "P-384", "Ed25519", "RSA"])
def test_keys_of_the_user_sign_and_are_trusted_by_who_says_so(sort: str, tmp_path: Path) -> None:
    key = {
        "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "Ed25519": ed25519.Ed25519PrivateKey.generate,
        "RSA": lambda: rsa.generate_private_key(65537, 2048),
    }[sort]()
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = _issued("An authority", root_key, _name("An authority"), root_key, True)
    mine = _issued("A newspaper", key, _name("An authority"), root_key, False)
    stranger = _issued("Other", root_key, _name("Other"), root_key, True)
    (tmp_path / CERTIFICATES).write_bytes(_pem(mine) + _pem(root))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / KEY).write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    data = Signer.read(tmp_path).sign(PICTURE, "PNG", Drawing.of("0123abcd", PROMPT))
    plain = find_credentials(data, "image/png")
    assert plain.state == "valid" and "A newspaper" in plain.signer
    assert "anyone can write any name" in plain.lines()[-1]
    assert find_credentials(data, "image/png", _pem(root)).state == "trusted"
    assert find_credentials(data, "image/png", _pem(stranger)).state == "valid"


def test_bad_keys_are_named_before_anything_is_drawn(signer: Signer, tmp_path: Path) -> None:
    other = make_signer(tmp_path / "other")
    (tmp_path / KEY).write_bytes(b"no key")
    (tmp_path / CERTIFICATES).write_bytes(signer.certificates)
    with pytest.raises(ValueError, match="key.pem"):
        Signer.read(tmp_path)
    (tmp_path / KEY).write_bytes(other.key)  # of another certificate
    with pytest.raises(ValueError, match="cannot sign|belong"):
        Signer.read(tmp_path)
    assert (tmp_path / "other" / KEY).stat().st_mode & 0o077 == 0, "private"


def test_the_verb_says_it_in_words_and_in_json(
    signer: Signer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, none = (tmp_path / f"{name}.png" for name in ("good", "bad", "none"))
    data = signer.sign(PICTURE, "PNG", Drawing.of("0123abcd", PROMPT))
    good.write_bytes(data)
    changed = bytearray(data)
    changed[data.rindex(b"IDAT") + 40] ^= 1
    bad.write_bytes(changed)
    PICTURE.save(none)
    assert main(["provenance", str(good)]) == 0
    assert "not changed since it was signed" in capsys.readouterr().out
    assert main(["provenance", str(good), str(bad), str(none), "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["state"] for line in lines] == ["valid", "changed", "none"]
    assert main(["provenance", str(none)]) == 1
    assert "no content credentials" in capsys.readouterr().out
    (tmp_path / "text.png").write_text("hello")
    assert main(["provenance", str(tmp_path / "text.png")]) == 1
    assert "expected a PNG" in capsys.readouterr().err


def test_drawings_of_the_command_line_are_signed(tmp_path: Path) -> None:
    keys, out = tmp_path / "keys", tmp_path / "d.png"
    assert main(["draw", "a red circle", "--out", str(out), "--sign", str(keys)]) == 0
    found = read_credentials(out)
    assert found.state == "valid" and found.drawing is not None
    config = json.loads(Path("multimodal/starter/config.json").read_text("utf-8"))
    assert found.drawing["model"] == config["fingerprints"]["model"]
    assert found.drawing["prompt_sha256"] == hashlib.sha256(b"a red circle").hexdigest()
    # A shell can give bytes that are not UTF-8. It must not fail after the work.
    assert Drawing.of("", "a red \udcff").prompt_sha256 != Drawing.of("", "a red ?").prompt_sha256
    edit = ["edit", str(out), "--box", "0,0,32,32", "--prompt", "a dog", "--steps", "1"]
    edited = tmp_path / "edited.jpg"
    assert main([*edit, "--out", str(edited), "--sign", str(keys)]) == 0
    assert read_credentials(edited).source_types == ("compositeWithTrainedAlgorithmicMedia",)


@pytest.mark.parametrize("data", ["a text", 7, [["model", 1]], {"model": {"a": 1}}])
def test_whatever_another_has_signed_no_file_ends_a_listing(
    signer: Signer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: object,
) -> None:
    drawing, odd, good = Drawing.of("0123abcd", PROMPT), tmp_path / "odd.png", tmp_path / "good.png"
    good.write_bytes(signer.sign(PICTURE, "PNG", drawing))
    told = drawing.manifest()
    told["assertions"][1]["data"] = data
    monkeypatch.setattr(Drawing, "manifest", lambda self: told)
    odd.write_bytes(signer.sign(PICTURE, "PNG", drawing))
    assert main(["provenance", str(odd), str(good), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["state"] for line in lines] == ["valid", "valid"]
    assert lines[0]["drawing"] == ({"model": "{'a': 1}"} if isinstance(data, dict) else None)


@pytest.mark.parametrize(
    "data", ["a text", {"actions": "a text"}, {"actions": ["a", {"action": "b"}]}]
)
def test_actions_of_another_form_are_left_out(data: object) -> None:
    """As a report of c2pa might have them."""
    assertions = [{"label": "c2pa.actions.v2", "data": data}, {"label": "c2pa.actions"}]
    manifests = {"one": {"assertions": assertions}}
    found = _finding({"active_manifest": "one", "manifests": manifests})
    assert found.actions in ((), ("b",)) and found.source_types == ()
