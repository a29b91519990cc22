"""Names of the vectors in a store: one for each criterion, and `universal`."""

from __future__ import annotations

from crl_sdk._criterion import normalise_criterion
from crl_sdk.errors import InvalidInputError
from crl_sdk.stored._directory import ID, PATH, UNIVERSAL

_TAKEN = frozenset(
    {ID, PATH, "ctid", "cmax", "cmin", "tableoid", "xmax", "xmin"}  # PostgreSQL's own
)
_TO_FIELD = str.maketrans({" ": "_", "_": "U", "-": "H"})
_FROM_FIELD = str.maketrans({"_": " ", "U": "_", "H": "-"})
_DIGIT, _TAKEN_MARK = "N", "C"
_LONGEST = 63  # bytes of a column's name in PostgreSQL


def field_of(criterion: str) -> str:
    """Return the name of a criterion's vector, which every store accepts.

    Criteria have no capital letters. The name has them for what stores refuse: `U` is an
    underscore, `H` a hyphen and `_` a space. `N` comes before a digit at the beginning, and `C`
    before a name that is taken, such as `path`. Distinct criteria have distinct names.

    Args:
        criterion: Criterion in words.

    Raises:
        CriterionError: If the criterion is malformed.
        InvalidInputError: If the name would be longer than 63 characters, or is `universal`.

    Example:
        >>> from crl_sdk.vector_stores import field_of
        >>> field_of("animal habitat"), field_of("time-of-day"), field_of("3d shape")
        ('animal_habitat', 'timeHofHday', 'N3d_shape')
    """
    name = normalise_criterion(criterion)
    if name == UNIVERSAL:
        raise InvalidInputError(
            f"criterion {name!r}: stores use this name for the universal embeddings: give the "
            "basis another name"
        )
    field = name.translate(_TO_FIELD)
    if field in _TAKEN:
        field = _TAKEN_MARK + field
    if field[0].isdigit():
        field = _DIGIT + field
    if len(field) > _LONGEST:
        raise InvalidInputError(
            f"criterion {name!r}: its vector would have a name of {len(field)} characters, and "
            f"stores allow {_LONGEST}: give the basis a shorter name"
        )
    return field


def criterion_of(field: str) -> str:
    """Return the criterion of a vector's name, see `field_of`."""
    return field.lstrip(_DIGIT + _TAKEN_MARK).translate(_FROM_FIELD)
