"""Membership attacks as printed in papers, for comparison: SalUn's MIA-efficacy and SSD's.

Both are fitted on retained against test records and asked about the forget records. Neither has an ideal
of its own: the retrained model's value is.
"""

from __future__ import annotations

import numpy as np

from palimpsest.audit.membership import population
from palimpsest.audit.membership.evidence_scores import same_draw, signals_of
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding
from palimpsest.core.intervals import clopper_pearson
from palimpsest.core.scale import judged

NOTES = {
    "svc_member_share": "share of forget called member; the printed MIA-efficacy is 1 minus this",
    "entropy_member_share": "share of forget called member by its entropy, as printed with SSD",
}


def published_attacks(evidence: Evidence, limit: int) -> list[Finding]:
    """Shares of the forget records that the published attacks call members.

    Args:
        evidence: With retain and test parts; without them nothing is found.
        limit: Records a side that the attacks are fitted on; as many of either.
    """
    if not (evidence.has("retain") and evidence.has("test")):
        return []
    kept = np.flatnonzero(~evidence.split.like_forgotten(evidence.records("test")))
    size = min(limit, len(kept), len(evidence.records("retain")))
    if size < 2:
        return []
    random = same_draw(evidence, "published")
    test = np.sort(random.permutation(kept)[:size])
    retain = np.sort(random.permutation(len(evidence.records("retain")))[:size])
    shares: dict[str, dict[str, float]] = {name: {} for name in NOTES}
    for role in evidence.roles:
        inside = signals_of(evidence, role, "retain", retain)
        outside = signals_of(evidence, role, "test", test)
        forget = signals_of(evidence, role, "forget")
        confidence = [side["probability"][:, None] for side in (inside, outside, forget)]
        entropy = [-side["entropy"][:, None] for side in (inside, outside, forget)]
        efficacy = population.svc_attack(confidence[0], confidence[1], confidence[2])
        shares["svc_member_share"][role] = 1 - efficacy
        shares["entropy_member_share"][role] = population.member_share(entropy[0], entropy[1], entropy[2])
    return [_finding(evidence, name, values) for name, values in shares.items()]


def _finding(evidence: Evidence, name: str, values: dict[str, float]) -> Finding:
    n = len(evidence.records("forget"))
    low, high = clopper_pearson(round(values[UNLEARNED] * n), n)
    finding = Finding(
        "membership",
        name,
        values[UNLEARNED],
        low,
        high,
        n=n,
        more_is="knowledge",
        original=values.get(ORIGINAL),
        controls=tuple(values[role] for role in evidence.control_roles),
        note=NOTES[name],
    )
    return judged(finding, floor=1 / n)
