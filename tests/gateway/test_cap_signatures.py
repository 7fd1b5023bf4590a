"""XML signatures of CAP messages: what was signed and by whom, and every way in which it is refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from lxml import etree
from signxml.algorithms import CanonicalizationMethod, DigestAlgorithm, SignatureConstructionMethod, SignatureMethod
from signxml.signer import XMLSigner

from gateway.cap_messages import read_message
from gateway.cap_signatures import NO_CERTIFICATES, CapCertificates, Signed
from gateway.cap_xml import CAP_NAMESPACE, SIGNATURE_NAMESPACE, CapRefused, parse_cap
from tests.gateway.cap_examples import FOLDER, cap_xml

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
SENDER = "cap@police.example.cn"
DS, CAP = f"{{{SIGNATURE_NAMESPACE}}}", f"{{{CAP_NAMESPACE}}}"

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Signer:
    """A key and its certificate."""

    key: Key
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def sign(
        self,
        body: bytes,
        method: SignatureMethod = SignatureMethod.RSA_SHA256,
        digest: DigestAlgorithm = DigestAlgorithm.SHA256,
        reference_uri: str | None = None,
        canonical: CanonicalizationMethod = CanonicalizationMethod.CANONICAL_XML_1_0,
    ) -> bytes:
        signer = XMLSigner(SignatureConstructionMethod.enveloped, method, digest, canonical)
        root = signer.sign(etree.fromstring(body), key=self.key, cert=[self.certificate], reference_uri=reference_uri)
        return bytes(etree.tostring(root))


def certified(key: Key, begin: datetime = NOW - timedelta(days=30), days: int = 365, name: str = "CAP 测试") -> Signer:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(SENDER)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Signer(key, certificate)


@pytest.fixture(scope="module")
def signer() -> Signer:
    return certified(rsa.generate_private_key(65_537, 2048))


@pytest.fixture(scope="module")
def stranger() -> Signer:
    return certified(rsa.generate_private_key(65_537, 2048), name="somebody else")


@pytest.fixture(scope="module")
def known(signer: Signer) -> CapCertificates:
    return CapCertificates([signer.certificate])


def refusal(known: CapCertificates, body: bytes, now: datetime = NOW) -> CapRefused:
    with pytest.raises(CapRefused) as caught:
        known.verify(body, now)
    assert caught.value.reason == "signature"
    return caught.value


def changed(body: bytes, change: Callable[[etree._Element], None]) -> bytes:
    root = etree.fromstring(body)
    change(root)
    return bytes(etree.tostring(root))


# --- taken ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "canonical",
    [
        CanonicalizationMethod.CANONICAL_XML_1_0,
        CanonicalizationMethod.CANONICAL_XML_1_1,
        CanonicalizationMethod.EXCLUSIVE_XML_CANONICALIZATION_1_0,
    ],
)
def test_what_was_signed_is_what_is_read(
    known: CapCertificates, signer: Signer, canonical: CanonicalizationMethod
) -> None:
    signed = known.verify(signer.sign(cap_xml(sender=SENDER), canonical=canonical), NOW)
    assert signed is not None
    assert signed.certificate == signer.certificate
    assert signed.speaks_for(SENDER)
    assert not signed.speaks_for("cap@other.example.cn")
    assert signed.subject == "CN=CAP 测试"
    assert read_message(parse_cap(signed.document)) == read_message(parse_cap(cap_xml(sender=SENDER)))
    assert b"Signature" not in signed.document


def test_an_elliptic_curve_signs_as_well() -> None:
    signer = certified(ec.generate_private_key(ec.SECP256R1()))
    body = signer.sign(cap_xml(sender=SENDER), SignatureMethod.ECDSA_SHA256)
    assert isinstance(CapCertificates([signer.certificate]).verify(body, NOW), Signed)


def test_a_message_without_a_signature_has_none(known: CapCertificates) -> None:
    assert known.verify(cap_xml(), NOW) is None
    assert NO_CERTIFICATES.verify(cap_xml(), NOW) is None


def test_the_certificate_in_use_is_found_among_several(signer: Signer, stranger: Signer) -> None:
    known = CapCertificates([stranger.certificate, signer.certificate])
    signed = known.verify(signer.sign(cap_xml()), NOW)
    assert signed is not None
    assert signed.certificate == signer.certificate


def test_comments_of_a_signed_message_are_not_read(known: CapCertificates, signer: Signer) -> None:
    body = signer.sign(cap_xml()).replace(b"2026-330106-17", b"2026-330106<!-- added -->-17")
    signed = known.verify(body, NOW)  # canonical XML leaves comments out
    assert signed is not None
    assert read_message(parse_cap(signed.document)).identifier == "2026-330106-17"


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_changed_message_is_refused(known: CapCertificates, signer: Signer) -> None:
    body = signer.sign(cap_xml()).replace(b"30.2741", b"31.2741")
    assert refusal(known, body).expected == "a signature that fits the message"


def test_a_changed_signature_is_refused(known: CapCertificates, signer: Signer) -> None:
    def change(root: etree._Element) -> None:
        value = root.find(f".//{DS}SignatureValue")
        value.text = ("B" if value.text[0] == "A" else "A") + value.text[1:]

    assert refusal(known, changed(signer.sign(cap_xml()), change)).expected == "a signature that fits the message"


def test_a_stranger_is_refused_though_it_brings_its_certificate(known: CapCertificates, stranger: Signer) -> None:
    refused = refusal(known, stranger.sign(cap_xml()))
    assert refused.expected == "a certificate that is configured here"
    assert "somebody else" in refused.came
    assert refusal(NO_CERTIFICATES, stranger.sign(cap_xml())).expected == "a certificate that is configured here"


def test_a_known_certificate_beside_a_strangers_signature_is_refused(
    known: CapCertificates, signer: Signer, stranger: Signer
) -> None:
    ours = etree.fromstring(signer.sign(cap_xml())).find(f".//{DS}X509Certificate").text

    def change(root: etree._Element) -> None:
        root.find(f".//{DS}X509Certificate").text = ours

    body = changed(stranger.sign(cap_xml()), change)
    assert refusal(known, body).expected == "a signature that fits the message"


@pytest.mark.parametrize(("begin", "days"), [(NOW - timedelta(days=400), 365), (NOW + timedelta(days=1), 365)])
def test_a_certificate_is_valid_for_its_time_alone(begin: datetime, days: int) -> None:
    signer = certified(rsa.generate_private_key(65_537, 2048), begin, days)
    known = CapCertificates([signer.certificate])
    body = signer.sign(cap_xml())
    assert refusal(known, body).expected == "a certificate that is valid now"
    assert known.verify(body, begin + timedelta(days=days / 2)) is not None


def test_the_weak_algorithms_of_old_are_refused(known: CapCertificates, signer: Signer) -> None:
    class Sha1Signer(XMLSigner):
        def check_deprecated_methods(self) -> None:
            pass

    root = Sha1Signer(SignatureConstructionMethod.enveloped, SignatureMethod.RSA_SHA1, DigestAlgorithm.SHA256).sign(
        etree.fromstring(cap_xml()), key=signer.key, cert=[signer.certificate]
    )
    refused = refusal(known, bytes(etree.tostring(root)))
    assert (refused.element, refused.came) == ("Signature/SignedInfo/SignatureMethod", "'rsa-sha1'")


def test_a_public_key_is_no_password(known: CapCertificates, signer: Signer) -> None:
    """HMAC, with the certificate for a key that everybody knows."""
    signing = XMLSigner(SignatureConstructionMethod.enveloped, SignatureMethod.HMAC_SHA256, DigestAlgorithm.SHA256)
    root = signing.sign(etree.fromstring(cap_xml()), key=signer.pem)
    assert refusal(known, bytes(etree.tostring(root))).came == "'hmac-sha256'"


def test_the_real_signed_message_is_refused_for_its_second_signature(known: CapCertificates) -> None:
    refused = refusal(known, (FOLDER / "canada_signed.cap").read_bytes())
    assert (refused.expected, refused.came, refused.line) == ("one signature", "2", 428)


def test_one_signature_of_the_real_message_is_refused_for_sha1(known: CapCertificates) -> None:
    def change(root: etree._Element) -> None:
        root.remove(root.findall(f"{DS}Signature")[0])

    refused = refusal(known, changed((FOLDER / "canada_signed.cap").read_bytes(), change))
    assert (refused.element, refused.came) == ("Signature/SignedInfo/SignatureMethod", "'rsa-sha1'")


# --- wrapped ----------------------------------------------------------------------------------------------------------


def _signed_in_note(root: etree._Element) -> None:
    """The signed message inside another one, which carries its signature where it is looked for."""
    original = deepcopy(root)
    signature = root.find(f"{DS}Signature")
    original.remove(original.find(f"{DS}Signature"))
    etree.SubElement(signature, f"{DS}Object").append(original)
    root.find(f"{CAP}identifier").text = "forged"


def _signature_deeper(root: etree._Element) -> None:
    root.find(f"{CAP}info").append(root.find(f"{DS}Signature"))


def _another_alert_beside(root: etree._Element) -> None:
    forged = etree.fromstring(cap_xml(identifier="forged"))
    for child in forged:
        root.append(child)


def _reference_to_a_part(root: etree._Element) -> None:
    root.find(f".//{DS}Reference").set("URI", "#part")


def _no_reference(root: etree._Element) -> None:
    del root.find(f".//{DS}Reference").attrib["URI"]


def _two_references(root: etree._Element) -> None:
    reference = root.find(f".//{DS}Reference")
    reference.getparent().append(deepcopy(reference))


def _another_transform(root: etree._Element) -> None:
    transforms = root.find(f".//{DS}Transforms")
    etree.SubElement(transforms, f"{DS}Transform").set("Algorithm", "http://www.w3.org/TR/1999/REC-xpath-19991116")


def _without_transform(root: etree._Element) -> None:
    transforms = root.find(f".//{DS}Transforms")
    transforms.remove(transforms[0])


def _comments_count(root: etree._Element) -> None:
    method = root.find(f".//{DS}CanonicalizationMethod")
    method.set("Algorithm", method.get("Algorithm") + "#WithComments")


def _two_signatures(root: etree._Element) -> None:
    root.append(deepcopy(root.find(f"{DS}Signature")))


def _another_object(root: etree._Element) -> None:
    etree.SubElement(root.find(f"{DS}Signature"), f"{DS}Object").text = "not signed"


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (_signed_in_note, "no Object in it"),
        (_another_object, "no Object in it"),
        (_signature_deeper, "a signature directly in alert"),
        (_another_alert_beside, "a signature that fits the message"),
        (_reference_to_a_part, 'URI="", the whole document'),
        (_no_reference, 'URI="", the whole document'),
        (_two_references, "exactly one"),
        (_another_transform, "enveloped-signature, then at most one canonicalization"),
        (_without_transform, "enveloped-signature, then at most one canonicalization"),
        (_comments_count, "an algorithm of REC-xml-c14n-20010315, xml-c14n11, xml-exc-c14n"),
        (_two_signatures, "one signature"),
    ],
)
def test_a_signature_that_covers_something_else_is_refused(
    known: CapCertificates, signer: Signer, wrap: Callable[[etree._Element], None], expected: str
) -> None:
    body = signer.sign(cap_xml())
    assert known.verify(changed(body, lambda root: None), NOW) is not None
    assert refusal(known, changed(body, wrap)).expected == expected


def test_a_genuine_signature_over_a_part_is_refused(known: CapCertificates, signer: Signer) -> None:
    body = signer.sign(cap_xml().replace(b"<info>", b'<info Id="part">'), reference_uri="#part")
    assert refusal(known, body).expected == 'URI="", the whole document'


def test_a_signature_around_a_message_is_refused(known: CapCertificates, signer: Signer) -> None:
    signing = XMLSigner(SignatureConstructionMethod.enveloping, SignatureMethod.RSA_SHA256, DigestAlgorithm.SHA256)
    root = signing.sign(etree.fromstring(cap_xml()), key=signer.key, cert=[signer.certificate])
    assert refusal(known, bytes(etree.tostring(root))).came == "the root itself"


@pytest.mark.parametrize("text", ["", "not base64!", "AAAA"])
def test_a_certificate_that_is_none_is_refused(known: CapCertificates, signer: Signer, text: str) -> None:
    def change(root: etree._Element) -> None:
        root.find(f".//{DS}X509Certificate").text = text

    refusal(known, changed(signer.sign(cap_xml()), change))


# --- the folder -------------------------------------------------------------------------------------------------------


def test_certificates_are_read_from_a_folder(tmp_path: Path, signer: Signer, stranger: Signer) -> None:
    (tmp_path / "police.pem").write_bytes(signer.pem + stranger.pem)
    (tmp_path / "README.txt").write_text("not read")
    known = CapCertificates.read(tmp_path)
    assert known.verify(signer.sign(cap_xml()), NOW) is not None
    assert known.verify(stranger.sign(cap_xml()), NOW) is not None


@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"])
def test_a_file_that_holds_no_certificate_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "police.pem").write_bytes(content)
    with pytest.raises(ValueError, match=r"police\.pem: must hold certificates"):
        CapCertificates.read(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold certificates in files"):
        CapCertificates.read(tmp_path)


def test_a_weak_key_is_refused(tmp_path: Path) -> None:
    weak = certified(rsa.generate_private_key(65_537, 1024))
    (tmp_path / "weak.pem").write_bytes(weak.pem)
    with pytest.raises(ValueError, match=r"weak\.pem.*at least 2048 bits, got 1024"):
        CapCertificates.read(tmp_path)
