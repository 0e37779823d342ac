"""Write the run files of this folder: for every published size and way, and for rows of hardware tables.

Each is planned anew by `trivium.plan`: the cheapest hardware on which it fits, or the hardware of the table's row.
Devices and prices are those that Trivium ships, never the user's own.

    python recipes/make.py [--check] [NAME]...
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["TRIVIUM_HOME"] = os.devnull  # no edits of prices, no calibration

from trivium.config.load import ResolvedRun, load_run, to_yaml
from trivium.errors import DoesNotFit
from trivium.model import catalog
from trivium.model.shape import QwenShape
from trivium.plan import devices
from trivium.plan.devices import Device
from trivium.plan.facts import DataFacts, given_facts
from trivium.plan.fit import cheapest_fixes
from trivium.plan.goal import Goal, Plan
from trivium.plan.network import shape_of_run
from trivium.plan.reasons import GIVEN
from trivium.plan.search import search
from trivium.plan.write import run_text

FOLDER = Path(__file__).resolve().parent
NODE = (1, 2, 4, 8)
TITLES = {"lora": "LoRA", "qlora": "QLoRA", "full": "Full fine-tuning"}
"""The ways that learn from conversations."""
DATA = {"conversations": "chats.jsonl", "documents": "corpus.jsonl"}
USUAL_FACTS = {
    "conversations": given_facts("conversations", num_rows=10_000, mean_tokens=400),
    "documents": given_facts("documents", num_tokens=10**9),
}
TOKENS_PER_PARAM = 20
AS_IT_STANDS = ("optimizer.state_dtype=fp32", "parallel.offload=none")  # as tables reckon
SEARCHED = ("batch.micro_tokens", "activation_checkpointing", "optimizer.state_dtype")


@dataclass(frozen=True)
class Recipe:
    """A run file to be planned.

    Attributes:
        name: of the file, without its ending.
        purpose: the first line of its header.
        method, model: the way, and what is trained.
        device: what it is planned for; None takes the cheapest that can be rented.
        num_devices: how many there may be.
        settings: `key=value`, what the recipe sets itself.
        facts: the data its figures are for.
        said: whether a table says that this fits; None where none does.
    """

    name: str
    purpose: str
    method: str
    model: str
    device: str | None = None
    num_devices: tuple[int, ...] = NODE
    settings: tuple[str, ...] = ()
    facts: DataFacts | None = None
    said: bool | None = None

    @property
    def data(self) -> DataFacts:
        """The data its figures are for: what is usual for the way, if nothing else is said."""
        return self.facts or USUAL_FACTS["conversations" if self.method in TITLES else "documents"]


def published() -> Iterator[Recipe]:
    """Every size that Qwen publishes, every way to go on from it, and two small ones from nothing of each family."""
    for family in (catalog.QWEN25, catalog.QWEN3):
        for name in family:
            chat = name if name.startswith("Qwen3") else f"{name}-Instruct"
            base = f"{name}-Base" if name.startswith("Qwen3") else name
            for method, title in TITLES.items():
                yield Recipe(f"{name.lower()}-{method}", f"{title} of {chat} on conversations.", method, f"Qwen/{chat}")
            if base in catalog.names():
                purpose = f"Continued pre-training of {base} on text of a domain."
                yield Recipe(f"{name.lower()}-continue", purpose, "continue", f"Qwen/{base}")
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen3-0.6B", "Qwen3-1.7B"):
        yield from_scratch(f"{name.lower()}-scratch", f"A model of the shape of {name} from nothing.", f"Qwen/{name}")
    purpose = "A first model from nothing: 25 million parameters, with a tokenizer of its own."
    yield from_scratch("scratch-25m", purpose, "25M")


def from_scratch(name: str, purpose: str, model: str) -> Recipe:
    """On about twenty tokens for each parameter, after Hoffmann et al. 2022, arXiv:2203.15556."""
    num_params = 25e6 if model == "25M" else catalog.get(model.partition("/")[2]).num_params
    tokens = round(TOKENS_PER_PARAM * num_params, -8)
    settings = (f"budget.tokens={tokens:.0f}", "optimizer.lr=6e-4", "batch.tokens=262144")
    return Recipe(
        name, purpose, "scratch", model, None, NODE, settings, given_facts("documents", num_tokens=int(tokens))
    )


def capstone() -> Recipe:
    """A small model that tells fairy tales in Korean, tuned on a laptop."""
    purpose = (
        "A teller of Korean fairy tales: LoRA of a small chat model on five thousand synthetic tales, on a laptop."
    )
    facts = given_facts("conversations", num_rows=5_000, mean_tokens=500)
    settings = ("data=tales.jsonl", "budget.epochs=1", 'sample.prompts=["옛날 옛적 깊은 산속에"]')
    return Recipe(
        "fairy-tales-korean", purpose, "lora", "Qwen/Qwen2.5-0.5B-Instruct", "cpu-laptop", (1,), settings, facts
    )


def table_rows() -> Iterator[Recipe]:
    """Rows of two guides' hardware tables (docs/planner.md), each for the hardware that the guide names."""
    adapters = (
        ("0.5b", "lora", "t4", "T4", (), True),
        ("1.5b", "lora", "t4", "T4", (), True),
        ("3b", "lora", "t4", "T4", (), True),
        ("7b", "lora", "rtx-4090", "24 GB", (), True),
        ("7b", "lora-qv", "rtx-4090", "24 GB", ("adapter.targets=[q_proj, v_proj]",), True),
        ("7b", "lora-qv", "a100-40", "A100 40GB", ("adapter.targets=[q_proj, v_proj]",), True),
        ("7b", "lora", "a100-40", "A100 40GB", (), True),
        ("7b", "lora", "a100-80", "A100 80GB", (), True),
        ("7b", "qlora", "t4", "T4", (), True),
        ("7b", "qlora", "rtx-4090", "24 GB", (), True),
        ("14b", "qlora", "rtx-4090", "24 GB", (), True),
        ("72b", "qlora", "a100-80", "A100 80GB", (), True),
        ("0.5b", "full", "t4", "T4", (), True),
        ("1.5b", "full", "a100-80", "A100 80GB", (), True),
        ("3b", "full", "a100-80", "A100 80GB", (), True),
        ("7b", "full", "a100-80", "A100 80GB", (), False),
    )
    for size, way, device, title, settings, said in adapters:
        method, model = way.partition("-")[0], f"Qwen2.5-{size.upper()}-Instruct"
        name = f"table-qwen2.5-{size}-{way}-{title.replace(' ', '-').lower().removesuffix('gb').rstrip('-')}"
        name += "gb" if title == "24 GB" else ""
        parts = " on q_proj and v_proj" if way.endswith("-qv") else ""
        hardware = "a card of 24 GB" if title == "24 GB" else f"one {title}"
        purpose = f"Row of the hardware tables: {TITLES[method]}{parts} of {model} on {hardware}."
        yield Recipe(name, purpose, method, f"Qwen/{model}", device, (1,), settings, said=said)
    for count, device, title, strategy, seq_len in (
        (2, "a100-80", "A100 80GB", "zero2", 1024),
        (4, "a100-80", "A100 80GB", "zero2", 4096),
        (4, "a100-80", "A100 80GB", "zero3", 4096),
        (4, "a100-40", "A100 40GB", "zero3", 1024),
        (8, "a100-40", "A100 40GB", "zero3", 4096),
    ):
        yield Recipe(
            f"table-qwen2.5-7b-full-{count}x-{device}-{strategy}",
            f"Row of the hardware tables: full fine-tuning of Qwen2.5-7B-Instruct on {count} x {title}, {strategy}.",
            "full",
            "Qwen/Qwen2.5-7B-Instruct",
            device,
            (count,),
            (f"parallel.strategy={strategy}", f"data.seq_len={seq_len}", "batch.tokens=65536"),
            said=True,
        )
    trillion = given_facts("documents", num_tokens=10**12)
    for count, device, title in (
        (8, "a100-80", "A100 80GB"),
        (32, "h100-80", "H100 80GB"),
        (64, "h100-80", "H100 80GB"),
        (256, "h100-80", "H100 80GB"),
    ):
        yield Recipe(
            f"table-qwen2.5-7b-scratch-{count}x-{device}",
            f"Row of the hardware tables: a model of the shape of Qwen2.5-7B from nothing on {count} x {title}.",
            "scratch",
            "Qwen/Qwen2.5-7B",
            device,
            (count,),
            ("budget.tokens=1T", "data.seq_len=4096", "batch.tokens=4194304", "optimizer.lr=3e-4"),
            trillion,
            said=True,
        )


def resolve(recipe: Recipe, settings: tuple[str, ...] = ()) -> ResolvedRun:
    """The recipe as a run, before anything is chosen."""
    given = [
        f"method={recipe.method}",
        f"model={recipe.model}",
        f"data={DATA[recipe.data.kind]}",
        f"name={recipe.name}",
    ]
    return load_run(None, [*given, *recipe.settings, *settings])


def find_plan(recipe: Recipe, there: Mapping[str, Device], settings: tuple[str, ...] = ()) -> Plan:
    """The cheapest plan on the recipe's hardware. Raises: DoesNotFit."""
    resolved = resolve(recipe, settings)
    rented = tuple(device for device in there.values() if device.kind == "gpu" and device.price_per_hour)
    set_keys = frozenset(key for key, origin in resolved.origins.items() if not origin.startswith("default"))
    return search(
        Goal(
            runs=(resolved.run,),
            shape=known_shape(resolved),
            devices=(there[recipe.device],) if recipe.device else rented,
            num_devices=recipe.num_devices,
            set_keys=set_keys - {"method"},
            facts=recipe.data,
        )
    )


def known_shape(resolved: ResolvedRun) -> QwenShape:
    """The network; of a recipe it is always known."""
    shape = shape_of_run(resolved.run)
    assert shape is not None
    return shape


def fitting_plan(recipe: Recipe, there: Mapping[str, Device]) -> tuple[Plan, str]:
    """The plan, and in words what was changed to make a table's row fit; nothing where nothing had to be."""
    if recipe.said is None or recipe.device is None:
        return find_plan(recipe, there), ""
    with suppress(DoesNotFit):
        return find_plan(recipe, there, AS_IT_STANDS), ""
    with suppress(DoesNotFit):
        plan = find_plan(recipe, there)
        states, offload = (
            f"optimizer.state_dtype: {plan.workload.state_dtype}",
            f"parallel.offload: {plan.workload.offload}",
        )
        return plan, " and ".join(text for text in (states, offload) if not text.endswith((" fp32", " none")))
    resolved, device = resolve(recipe), there[recipe.device]
    goal = Goal((resolved.run,), known_shape(resolved), (device,), facts=recipe.data)
    for fix in cheapest_fixes(goal.workload(resolved.run, device, recipe.num_devices[0]), device, count=20):
        changed = {key: value for key, value in fix.overrides.items() if key not in SEARCHED}
        if changed and not any(key.startswith("parallel.") for key in changed):
            settings = tuple(f"{key}={to_yaml(value)}" for key, value in changed.items())
            return find_plan(recipe, there, settings), " ".join(settings)
    raise DoesNotFit(f"{recipe.name} fits {device.title} with no change.")


def notes(recipe: Recipe, plan: Plan, changed: str) -> list[str]:
    """The header but for the figures: what it is for, what the figures stand on, how to run it."""
    data = recipe.data
    if data.kind == "conversations":
        amount = f"{data.num_rows:,} conversations of {data.mean_tokens:,.0f} tokens"
    else:
        amount = f"{data.num_tokens:,} tokens of text"
    file = plan.run.data.sources[0].path
    path = f"recipes/{recipe.name}.yaml"
    lines = [recipe.purpose, *verdict(recipe, changed)]
    lines += [f"Put your data's path in the place of {file}; the figures are predictions, for {amount}.", ""]
    if plan.workload.num_devices > 1:
        lines += ["Training on several devices is planned here, and not built yet.", f"trivium plan {path}"]
    else:
        lines += [f"trivium doctor {path}", f"trivium train {path}"]
    return [*lines, ""]


def verdict(recipe: Recipe, changed: str) -> Iterator[str]:
    """What became of a table's row."""
    if recipe.said is None:
        return
    if recipe.said and not changed:
        yield "The table says that it fits, and it does."
    else:
        said = "fits" if recipe.said else "does not fit"
        yield f"The table says that it {said}. As it stands it does not; it does with {changed}."


def text_of(recipe: Recipe, plan: Plan, changed: str) -> str:
    """The run file."""
    reasons = {key: "as the recipe has it" if why == GIVEN else why for key, why in plan.reasons.items()}
    return run_text(replace(plan, reasons=reasons), recipe.name, notes(recipe, plan, changed))


def recipes() -> list[Recipe]:
    """All of them."""
    return [*published(), capstone(), *table_rows()]


def main(words: list[str]) -> None:
    names = {word for word in words if not word.startswith("-")}
    there, wrong = devices.catalog(), []
    for recipe in recipes():
        if names and recipe.name not in names:
            continue
        path, text = FOLDER / f"{recipe.name}.yaml", text_of(recipe, *fitting_plan(recipe, there))
        if "--check" not in words:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            wrong.append(path.name)
    strangers = {path.stem for path in FOLDER.glob("*.yaml")} - {recipe.name for recipe in recipes()}
    if wrong or strangers:
        raise SystemExit(f"Not as recipes/make.py writes them: {', '.join([*wrong, *sorted(strangers)])}. Run it anew.")


if __name__ == "__main__":
    main(sys.argv[1:])
