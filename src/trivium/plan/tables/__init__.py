"""Two guides' tables computed again: every figure of theirs with ours beside it, the arithmetic, and a verdict.

`tables` is all of it, a few milliseconds' work; `show` prints it. Imported by the verb `plan` and by the generator of
docs/planner.md; never imports torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from trivium.plan import devices
from trivium.plan.tables import hardware, needs, sizes, times
from trivium.plan.tables.claim import Claim

SETTINGS_NOTE = (
    "In each cell the peak in GB (10^9 bytes) of a step of 4 rows of 1,024 tokens with the gentlest settings that fit: "
    "as it is; recomputed: activations are; then a row at a time as well, then AdamW's moments in 8 bits, then those "
    "in the host's memory. Of a device 92 % may be used. A T4 has no bf16, so everything is in fp32 there; "
    "programs that compute in fp16, which this one does not, take half. Guide B's own total for 7B is 94 GB."
)


@dataclass(frozen=True)
class Table:
    """Some claims of one subject, and a table of ours where one device after another is asked.

    Attributes:
        title: the subject.
        note: what to know before reading it.
        claims: each figure, judged.
        head, rows: of our own table; empty where there is none.
    """

    title: str
    note: str
    claims: tuple[Claim, ...]
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def tables() -> list[Table]:
    """Everything that the guides' tables say in numbers, computed with the catalogue's devices and prices."""

    def table(title: str, note: str, claims: Iterable[Claim]) -> Table:
        return Table(title, note, tuple(claims))

    there = devices.catalog()
    here = (
        "What the engine takes is that of a step of 4 rows of 1,024 tokens which all carry loss, adapters of rank 16."
    )
    return [
        table("Full fine-tuning", f"Sums of guide B with true counts of parameters. {here}", needs.full_claims()),
        table(
            "LoRA", f"The adapter is on all seven projections, in fp32 with its gradients. {here}", needs.lora_claims()
        ),
        table("QLoRA", f"Guide B's 13B and 70B are held to Qwen2.5-14B and 72B. {here}", needs.qlora_claims()),
        table("Qwen2.5-7B", "Guide A's figures for one model.", hardware.seven_billion_claims()),
        Table("What fits", SETTINGS_NOTE, tuple(hardware.fit_claims(there)), *hardware.fit_grid(there)),
        table("Several devices", "Full fine-tuning of Qwen2.5-7B, a row at a time.", hardware.several_claims(there)),
        table(
            "Time and money",
            "Predicted from data sheets, from the least tokens and the best speed to the most and the worst.",
            times.tuning_claims(there),
        ),
        Table(
            "From scratch",
            "Qwen2.5-7B in rows of 4,096 tokens and the fastest portions that fit; 200 Gbit/s a GPU between nodes.",
            tuple(times.scratch_claims(there)),
            *times.scratch_grid(there),
        ),
        table("Parameters", "Exact, of the published configurations.", sizes.parameter_claims()),
        table("The vocabulary wall", "What 151,936 tokens cost at each width.", sizes.vocabulary_claims()),
        table("Small configurations", "What the guide's five shapes really have.", sizes.small_claims()),
        table("Data", "How large a corpus is once it is tokenised.", times.data_claims()),
    ]
