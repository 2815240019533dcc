"""Content credentials: a picture says that a model drew it, and a change of it shows.

What is said: ``c2pa.created`` with IPTC's digital source type (``trainedAlgorithmicMedia``, or
``compositeWithTrainedAlgorithmicMedia`` for a part of a picture), the fingerprint of the model and
the SHA-256 of the prompt. It is signed and lies inside the file. Who copies the pixels elsewhere
loses it: credentials say where a picture comes from, their absence says nothing.

Specification: C2PA 2.x, https://spec.c2pa.org. Signed and checked by c2pa-python (extra
``provenance``).
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from multimodal.files import local_path, read_bytes

MISSING = "content credentials need: pip install 'multimodal[provenance]'"
KEY, CERTIFICATES = "key.pem", "certificates.pem"
SELF_MADE = "self-made key, proves nothing about who"
DRAWING = "org.multimodal.drawing"  # the label of what C2PA has no field for
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN, PARTLY_DRAWN = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
VALID_YEARS = 10  # of a self-made certificate
MAX_FILE = 1 << 30  # bytes of a picture that is read
# Nothing is fetched: neither credentials that lie elsewhere nor lists of certificates.
SETTINGS: dict[str, Any] = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": False},
    "builder": {"thumbnail": {"enabled": False}},
}


@dataclass(frozen=True)
class Drawing:
    """What is said of a picture.

    Attributes:
        model: the fingerprint of the model.
        prompt_sha256: of the prompt in UTF-8, 64 hex digits.
        source_type: ``DRAWN`` or ``PARTLY_DRAWN``.
    """

    model: str
    prompt_sha256: str
    source_type: str = DRAWN

    @classmethod
    def of(cls, model: str, prompt: str, source_type: str = DRAWN) -> "Drawing":
        sha256 = hashlib.sha256(prompt.encode("utf-8", "surrogatepass"))  # bytes of a shell
        return cls(model, sha256.hexdigest(), source_type)

    def manifest(self) -> dict[str, Any]:
        """The manifest as c2pa-python takes it."""
        from multimodal import __version__

        agent = {"name": "multimodal", "version": __version__}
        action = {
            "action": "c2pa.created",
            "digitalSourceType": SOURCE_TYPES + self.source_type,
            "softwareAgent": agent,
        }
        facts = {"model": self.model, "prompt_sha256": self.prompt_sha256}
        return {
            "claim_generator_info": [agent],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
                {"label": DRAWING, "data": facts},
            ],
        }


@dataclass(frozen=True)
class Signer:
    """A private key, and the certificates that say whose it is (PEM, that of the key first)."""

    key: bytes
    certificates: bytes

    @classmethod
    def read(cls, folder: str | Path) -> "Signer":
        """A folder with ``key.pem`` and ``certificates.pem``.

        Raises:
            ValueError: if they are not there, or cannot sign.
        """
        folder = local_path(folder)
        signer = cls(read_bytes(folder / KEY), read_bytes(folder / CERTIFICATES))
        try:  # now, and not after a drawing
            signer.sign(Image.new("RGB", (8, 8)), "PNG", Drawing.of("", ""))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        return signer

    def sign(self, image: Image.Image, kind: str, drawing: Drawing, **options: Any) -> bytes:
        """The bytes of an image file with credentials.

        Args:
            kind: PNG, JPEG or WEBP, as Pillow has it.
            options: of ``Image.save``.

        Raises:
            ValueError: if c2pa does not take the key or the certificates.
        """
        c2pa = _c2pa()
        algorithm = _algorithm(self.key)
        plain, signed = io.BytesIO(), io.BytesIO()
        image.save(plain, kind, **options)
        plain.seek(0)
        try:
            about = c2pa.C2paSignerInfo(algorithm, self.certificates, self.key, None)
            with (
                c2pa.Context.from_dict(SETTINGS) as context,
                c2pa.Signer.from_info(about) as signer,
                c2pa.Builder(drawing.manifest(), context) as builder,
            ):
                builder.sign(signer, f"image/{kind.lower()}", plain, signed)
        except c2pa.C2paError as error:
            raise ValueError(f"cannot sign with this key ({error})") from error
        return signed.getvalue()


@dataclass(frozen=True)
class Finding:
    """What the credentials of a picture say.

    Attributes:
        state: ``none`` (no credentials), ``changed`` (they do not hold for this file), ``valid``
            (they hold; who signed was not checked, or is not trusted), ``trusted`` (they hold, and
            a certificate that the reader trusts stands behind them).
        problems: why they do not hold.
        signer: the organization and the name in the certificate.
        drawing: what was said; nothing where others signed other things.
        actions: the names of the actions, as ``c2pa.created``.
    """

    state: str
    problems: Sequence[str] = ()
    signer: str = ""
    made_by: str = ""
    source_types: Sequence[str] = ()
    actions: Sequence[str] = ()
    drawing: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The same in words."""
        if self.state == "none":
            return ["no content credentials: nothing is known of where it comes from"]
        lines = []
        if self.state == "changed":
            lines.append(f"CHANGED since it was signed, or damaged: {'; '.join(self.problems)}")
            lines.append("what the credentials say is not about this file as it is now:")
        else:
            lines.append("not changed since it was signed")
        said = {
            DRAWN: "drawn by a model",
            PARTLY_DRAWN: "a picture of which a model drew a part",
        }
        lines += [f"it is {said.get(name, name)}" for name in self.source_types]
        if self.actions:
            lines.append(f"actions: {', '.join(self.actions)}")
        if self.made_by:
            lines.append(f"made by: {self.made_by}")
        for name, value in (self.drawing or {}).items():
            lines.append(f"{name.replace('_sha256', ', SHA-256')}: {value}")
        if self.signer:
            lines.append(f"signed by: {self.signer} ({self._trust()})")
        return lines

    def _trust(self) -> str:
        if self.state == "trusted":
            return "a certificate that you trust stands behind it"
        if SELF_MADE in self.signer:
            return "anyone can make such a key"
        return "whether this is true was not shown: anyone can write any name"


def make_signer(folder: str | Path) -> Signer:
    """Make a key and a certificate for it, in a new folder.

    The certificate says of itself that it proves nothing about who signs. It does show changes.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise ValueError(MISSING) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, SELF_MADE),
            x509.NameAttribute(NameOID.COMMON_NAME, "multimodal"),
        ]
    )
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        (
            "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        ),
        False,
    )  # fmt: skip
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1))
    builder = builder.not_valid_after(now + timedelta(days=365 * VALID_YEARS))
    # What C2PA asks of a certificate: https://spec.c2pa.org, "Certificate Profile".
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.KeyUsage(digital_signature=True, **usage), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False),
    ):
        builder = builder.add_extension(extension, critical)
    pem = serialization.Encoding.PEM
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(pem)
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    folder = local_path(folder)
    folder.mkdir(mode=0o700)  # the key is for its owner alone
    (folder / KEY).touch(mode=0o600)
    (folder / KEY).write_bytes(private)
    (folder / CERTIFICATES).write_bytes(certificate)
    return Signer.read(folder)


def read_credentials(path: str | Path, trusted: bytes = b"") -> Finding:
    """What the credentials of an image file say, and whether they hold.

    Args:
        trusted: certificates (PEM) of those whom the reader trusts.

    Raises:
        ValueError, OSError: for a file that is no PNG, JPEG or WebP.
    """
    data = read_bytes(path, MAX_FILE)
    return find_credentials(data, _mime(data, path), trusted)


def find_credentials(data: bytes, mime: str, trusted: bytes = b"") -> Finding:
    """The same for bytes. mime: image/png, image/jpeg or image/webp."""
    c2pa = _c2pa()
    settings = SETTINGS
    if trusted:
        trust = {"trust_anchors": trusted.decode("ascii", "replace")}
        settings = {**SETTINGS, "trust": trust}
        settings["verify"] = {**SETTINGS["verify"], "verify_trust": True}
    try:
        with c2pa.Context.from_dict(settings) as context:
            with c2pa.Reader(mime, io.BytesIO(data), context=context) as reader:
                report = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return Finding("none")
    except c2pa.C2paError as error:
        return Finding("changed", (f"the credentials cannot be read ({error})",))
    return _finding(report)


def _finding(report: Mapping[str, Any]) -> Finding:
    manifest = report.get("manifests", {}).get(report.get("active_manifest"), {})
    results = report.get("validation_results", {}).get("activeManifest", {})
    failures = [
        str(each.get("explanation") or each.get("code"))
        for each in results.get("failure", ())
        if each.get("code") != "signingCredential.untrusted"  # who signed, and not what
    ]
    validated = any(
        each.get("code") == "claimSignature.validated" for each in results.get("success", ())
    )
    state = "changed" if failures or not validated else "valid"
    if state == "valid" and report.get("validation_state") == "Trusted":
        state = "trusted"
    actions: list[Mapping[str, Any]] = []
    drawing = None
    for assertion in manifest.get("assertions", ()):
        label, data = str(assertion.get("label")), assertion.get("data")
        if not isinstance(data, Mapping):  # anyone can sign anything
            continue
        if label.startswith("c2pa.actions"):
            several = data.get("actions")
            several = several if isinstance(several, list) else []
            actions += [each for each in several if isinstance(each, Mapping)]
        elif label == DRAWING:
            drawing = {str(name): str(value) for name, value in data.items()}
    signature = manifest.get("signature_info", {})
    signer = [str(signature[name]) for name in ("issuer", "common_name") if name in signature]
    makers = [
        f"{each.get('name')} {each.get('version', '')}".strip()
        for each in manifest.get("claim_generator_info") or ()
    ]
    return Finding(
        state,
        tuple(failures) or (("its signature was not validated",) if state == "changed" else ()),
        ", ".join(signer),
        ", ".join(makers),
        tuple(
            str(each["digitalSourceType"]).rpartition("/")[2]
            for each in actions
            if each.get("digitalSourceType")
        ),
        tuple(str(each.get("action")) for each in actions),
        drawing,
    )


def _c2pa() -> ModuleType:
    try:
        import c2pa
    except ImportError as error:
        raise ValueError(MISSING) from error
    return c2pa


def _mime(data: bytes, path: str | Path) -> str:
    """By the first bytes: the rest of the file may be damaged."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if re.match(rb"RIFF....WEBP", data, re.DOTALL):
        return "image/webp"
    raise ValueError(f"{path}: expected a PNG, JPEG or WebP file")


def _algorithm(key: bytes) -> bytes:
    """The name that C2PA has for signatures with this key. Raises ``ValueError``."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    except ImportError as error:
        raise ValueError(MISSING) from error
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{KEY} is no private key without a password ({error})") from error
    if isinstance(private, ec.EllipticCurvePrivateKey):
        sizes = {256: b"es256", 384: b"es384", 521: b"es512"}
        if private.curve.key_size in sizes:
            return sizes[private.curve.key_size]
    elif isinstance(private, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    elif isinstance(private, rsa.RSAPrivateKey):
        return b"ps256"
    raise ValueError(f"{KEY}: expected a key of P-256, P-384, P-521, Ed25519 or RSA")
