"""Personal data in texts: what has a form that can be checked.

Names and addresses have none, so they are not found. Numbers of cards and accounts are checked by
their check digits, so that other long numbers stay.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """pattern: what may be one. check: whether it is."""

    pattern: re.Pattern[str]
    check: Callable[[str], bool] = lambda text: True


def find_personal(text: str, kinds: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    """Where something of these kinds stands: start, end and its kind, in the order of ``kinds``."""
    for name in kinds:
        for found in KINDS[name].pattern.finditer(text):
            if KINDS[name].check(found[0]):
                yield found.start(), found.end(), name


def _luhn(text: str) -> bool:
    """The check digit of cards (ISO/IEC 7812)."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return 13 <= len(digits) <= 19 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    """The check digits of bank accounts (ISO 13616)."""
    plain = re.sub(r"\s", "", text).upper()
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _telephone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15


KINDS: dict[str, Kind] = {
    "email": Kind(re.compile(r"[\w.%+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")),
    "iban": Kind(re.compile(r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{1,4}){3,8}\b", re.ASCII), _iban),
    "card": Kind(re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)", re.ASCII), _luhn),
    "ip": Kind(
        re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F:]{3,39})(?![\w:])"), _address
    ),
    "phone": Kind(
        re.compile(
            r"(?<![\w+])(?:\+|00)\d{1,3}[ /.-]?(?:\(?\d{1,5}\)?[ /.-]?){2,6}\d(?!\d)", re.ASCII
        ),
        _telephone,
    ),
}
