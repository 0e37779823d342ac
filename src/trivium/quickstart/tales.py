"""The words of the quickstart's little stories: plain tables, and the few helpers that lay them out.

`{slot}` in a phrase stands for another table. A FACT is chosen where it is first written and then stays for the
whole story (`{hero}`, `{thing}`); a PHRASE is chosen anew each time. `By` makes a table depend on facts already
written, so that the problem fits the thing and the place, the remedy the problem, the moral the character.
A capital (`{Hero}`, `{He}`) begins a sentence. In each list the earlier entry is the commoner one.
Every word that can follow "a" begins with a consonant, so that "an" is never needed.

Only `grammar.py` reads this file.
"""

from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class By:
    """A table that depends on facts: their values, as a tuple, name the list to choose from."""

    facts: tuple[str, ...]
    options: dict[tuple[str, ...], list[str]]


Table = list[str] | By


def words(text: str) -> list[str]:
    """Split a line of words; "_" stands for a blank inside one entry."""
    return [word.replace("_", " ") for word in text.split()]


def mixed(*lists: list[str]) -> list[str]:
    """Entries of all lists in turn, so that no list has only the common ones."""
    return [entry for group in zip_longest(*lists) for entry in group if entry is not None]


def by_one(fact: str, options: dict[str, list[str]]) -> By:
    """A table that depends on a single fact."""
    return By((fact,), {(value,): entries for value, entries in options.items()})


# Hero and friend have names and kinds of their own, so that a reader never confuses them.
GIRLS = words("Lily Mia Anna Lucy Rosie Nora Daisy Clara")
BOYS = words("Tom Ben Max Sam Jack Leo Oscar Peter")
FRIENDLY_GIRLS = words("Poppy Bella Hazel Tilly Pearl Juniper")
FRIENDLY_BOYS = words("Bruno Pip Biscuit Rufus Otto Barnaby")
KINDS = words("girl boy rabbit bear fox mouse cat squirrel pig goat beaver pony")
FRIENDLY_KINDS = words("duck frog hedgehog mole turtle badger crow donkey goose hare lizard raccoon")


def by_name(fact: str, she: str, he: str) -> By:
    """The pronoun that goes with a name; being certain, it costs nothing."""
    girls, boys = GIRLS + FRIENDLY_GIRLS, BOYS + FRIENDLY_BOYS
    return by_one(fact, {name: [she] for name in girls} | {name: [he] for name in boys})


# How a thing can come to harm depends on what it is made of, and on where it is.
THINGS = {
    "light": words("kite balloon hat scarf flag ribbon"),
    "floating": words("ball boat basket hoop bottle bucket"),
    "hard": words("drum bell lantern wagon scooter clock"),
}
PLACES = {
    "trees": words("forest park orchard woods hill playground"),
    "water": words("river lake pond beach harbour stream"),
    "mud": words("farm meadow garden field valley swamp"),
}
PROBLEMS = {
    ("light", "trees"): ["the wind blew it into a tall tree", "it got caught on a high branch"],
    ("light", "water"): ["the wind blew it over the water", "it came down on a rock far from the shore"],
    ("light", "mud"): ["it came down in a sharp bush", "it fell into the dirty mud"],
    ("floating", "trees"): ["it rolled into a deep hole", "it got caught on a high branch"],
    ("floating", "water"): ["the water carried it away", "it drifted under the bridge"],
    ("floating", "mud"): ["it rolled into a deep hole", "it fell into the dirty mud"],
    ("hard", "trees"): ["it hit a root and broke in two", "it got stuck between two trees"],
    ("hard", "water"): ["it sank to the bottom", "it slipped between two rocks"],
    ("hard", "mud"): ["it hit a stone and broke in two", "it fell into the dirty mud"],
}
# A thing that two pull at breaks in its own way, wherever they are.
DAMAGE = {"light": "it tore", "floating": "it cracked", "hard": "it broke"}
# What mends each problem, and how that looks when it is done.
REPAIRS = {
    ("brought it down", "reached it at last", "got it back to the ground"): {
        "the wind blew it into a tall tree": ["a ladder", "a long pole", "a tall stool"],
        "it got caught on a high branch": ["a ladder", "a long rake", "a box to stand on"],
    },
    ("brought it back to the shore", "pulled it out of the water", "got it back, dripping wet"): {
        "the wind blew it over the water": ["a fishing rod", "a paddle boat", "a raft"],
        "it came down on a rock far from the shore": ["a raft", "a paddle boat", "a plank"],
        "the water carried it away": ["a fishing net", "a raft", "a long stick"],
        "it drifted under the bridge": ["a fishing net", "a long stick", "a rope with a hook"],
        "it sank to the bottom": ["a strong magnet", "a rope with a hook", "a fishing net"],
    },
    ("pulled it out", "got it free", "worked until it came loose"): {
        "it came down in a sharp bush": ["thick gloves", "garden scissors", "a long rake"],
        "it rolled into a deep hole": ["a rope with a hook", "a shovel", "a long pole"],
        "it got stuck between two trees": ["a strong rope", "a saw", "some butter"],
        "it slipped between two rocks": ["a long stick", "some butter", "a strong magnet"],
    },
    ("made it clean", "washed it until it shone", "cleaned every bit of it"): {
        "it fell into the dirty mud": ["soap and water", "a wet cloth", "a brush"],
    },
    ("mended it", "fixed it well", "made it as good as new"): {
        "it hit a root and broke in two": ["strong glue", "a hammer and nails", "tape"],
        "it hit a stone and broke in two": ["strong glue", "a hammer and nails", "tape"],
        "it broke": ["strong glue", "tape", "a hammer and nails"],
        "it tore": ["a needle and thread", "tape", "a patch"],
        "it cracked": ["strong glue", "warm wax", "tape"],
    },
}
REMEDIES = {problem: remedies for cases in REPAIRS.values() for problem, remedies in cases.items()}

# Each character has its own fault or virtue, its own way to show it, and its own moral.
CARELESS = {
    "careless": (
        ["did not watch where {he} was going.", "was looking at {sight}.", "let go of the {thing} to wave at {sight}."],
        ["it is wise to take care", "a careful look saves a lot of tears"],
    ),
    "hasty": (
        ["could not wait and ran too fast.", "rushed past {sight} without a stop.", "hurried much too much."],
        ["it is better to go slowly", "those who rush often lose more time"],
    ),
    "proud": (
        ["said that all was well.", "wanted to show off to {sight}.", "laughed and did not listen."],
        ["it is good to listen to others", "nobody is too clever for a little advice"],
    ),
    "lazy": (
        ["was too lazy to hold on to it.", "lay down to look at {sight}.", "did not want to carry the {thing}."],
        ["a little work now saves a lot later", "lazy hands make a heavy day"],
    ),
    "stubborn": (
        ["shook {his} head and did it {his} own way.", "would not turn back.", "went on toward {sight} all the same."],
        ["it is never too late to change your mind", "a good friend is worth listening to"],
    ),
    "greedy": (
        ["was only thinking of {food}.", "wanted more and more.", "ran off to take things from {sight}."],
        ["enough is as good as a feast", "wanting too much can cost you what you have"],
    ),
}
SELFISH = {
    "selfish": (
        ['said, "It is mine and only mine!"', "held it tight."],
        ["sharing makes every game better", "a toy is more fun with two"],
    ),
    "bossy": (
        ['said, "You must do as I say!"', "wanted to make all the rules."],
        ["everyone should get a turn", "friends decide together"],
    ),
    "jealous": (
        ["could not bear to see {pal} so happy.", 'shouted, "You always get more!"'],
        ["there is room for more than one friend", "being glad for others makes you glad too"],
    ),
    "grumpy": (
        ['growled, "Leave me alone!"', "stamped {his} foot and would not let go."],
        ["kind words cost nothing", "a smile opens more doors than a frown"],
    ),
}
KIND = {
    "kind": (
        ["always wanted to help", "could not see others cry"],
        ["kindness comes back to you", "a small kind act can be very big"],
    ),
    "brave": (["was not afraid", "took a deep breath"], ["being brave means to try", "courage grows when you use it"]),
    "patient": (
        ["took time to think", "sat down and looked closely"],
        ["good things come to those who wait", "slow and steady gets it done"],
    ),
    "clever": (
        ["thought hard about it", "remembered a clever trick"],
        ["a good idea is better than strong arms", "thinking first is half the work"],
    ),
    "gentle": (
        ["spoke in a soft voice", "dried the tears of {pal}"],
        ["soft words can dry many tears", "being gentle is a way to be strong"],
    ),
    "cheerful": (
        ["smiled and gave {pal} a hug", "began to sing a {look} song"],
        ["a happy heart makes light work", "hope is the best helper"],
    ),
}
TRAITS = CARELESS | SELFISH | KIND

FACTS: dict[str, Table] = {
    "trait": mixed([*CARELESS], [*KIND], [*SELFISH]),
    "kind": KINDS,
    "hero": by_one("kind", {kind: mixed(GIRLS, BOYS) for kind in KINDS} | {"girl": GIRLS, "boy": BOYS}),
    "he": by_name("hero", "she", "he"),
    "his": by_name("hero", "her", "his"),
    "him": by_name("hero", "her", "him"),
    "pal": mixed(FRIENDLY_GIRLS, FRIENDLY_BOYS),
    "pal_kind": FRIENDLY_KINDS,
    "pal_he": by_name("pal", "she", "he"),
    "pal_his": by_name("pal", "her", "his"),
    "thing": mixed(*THINGS.values()),
    "place": mixed(*PLACES.values()),
    "problem": By(
        ("trait", "thing", "place"),
        {
            (trait, thing, place): [DAMAGE[made]] if trait in SELFISH else PROBLEMS[made, ground]
            for trait in TRAITS
            for made, things in THINGS.items()
            for ground, places in PLACES.items()
            for thing in things
            for place in places
        },
    ),
    "remedy": by_one("problem", REMEDIES),
    "moral": by_one("trait", {trait: morals for trait, (_, morals) in TRAITS.items()}),
}

PHRASES: dict[str, Table] = {
    "story": ["Once upon a time{opening} {likes} {plot}"],
    "opening": [
        ", there was a {trait} {kind} named {hero}.",
        ", a {trait} {kind} named {hero} lived {home}.",
        " there lived a {trait} {kind} called {hero}.",
        ", {home}, there lived a {trait} {kind} named {hero}.",
    ],
    "plot": by_one(
        "trait",
        {
            fault: ["{own} {outing} {meeting} {warning} {conduct} {loss} {sorrow} {help} {thanks} {end}"]
            for fault in CARELESS
        }
        | {fault: ["{own} {outing} {meeting} {quarrel} {sorrow} {help} {thanks} {end}"] for fault in SELFISH}
        | {virtue: ["{walk} {crying} {complaint} {comfort} {deed} {reward} {end}"] for virtue in KIND},
    ),
    "home": [
        "in a {look} house",
        "near a {look} mill",
        "in a {look} village",
        "on a {look} mountain",
        "under a {look} bridge",
        "by a {look} road",
        "behind a {look} wall",
        "in a {look} castle",
    ],
    "look": words(
        "little big pretty tiny strange quiet fine round shiny simple famous lovely "
        "beautiful crooked dusty fancy magic mossy narrow plain silly smooth tidy wooden"
    ),
    "likes": [
        "{He} loved {food} and {pastime}.",
        "{Hero} liked {pastime} and {food}.",
        "Every {time}, {he} ate {food} and dreamed of {pastime}.",
        "Nothing made {hero} as happy as {food} and {pastime}.",
        "{His} {relative} taught {him} {pastime} and made {him} {food}.",
    ],
    "pastime": words(
        "singing dancing swimming painting reading running jumping drawing cooking sleeping climbing "
        "counting_stars telling_jokes picking_flowers playing_chess digging_holes "
        "sailing skating gardening writing juggling marching exploring building"
    ),
    "relative": words("mother father sister brother grandmother grandfather cousin teacher uncle aunt"),
    "own": [
        "{His} {relative} gave {him} a {look} {colour} {thing}.",
        "The best thing {he} had was a {look} {colour} {thing}.",
        "For {his} birthday, {he} got a {colour} {thing} from {his} {relative}.",
        "{He} also had a {colour} {thing} that looked very {look}.",
    ],
    "weather": words(
        "sunny windy cold warm cloudy rainy bright foggy snowy hot misty stormy frosty gloomy mild pleasant"
    ),
    "time": words("morning day afternoon evening night"),
    "outing": [
        "One {weather} {time}, {hero} took the {thing} to the {scene} {place}.",
        "On a {weather} {time}, {he} went to the {scene} {place} with the {thing}.",
        "Then came a {weather} {time}, and {hero} carried the {thing} to a {look} {place}.",
    ],
    "scene": words(
        "old dark wide empty far noisy green hidden warm windy misty peaceful crowded gentle golden rocky "
        "bright lonely steep flowery"
    ),
    "walk": [
        "One {weather} {time}, {hero} went to the {scene} {place}.",
        "On a {weather} {time}, {he} walked to the {scene} {place} to look for {sight}.",
        "Then came a {weather} {time}, and {hero} ran all the way to a {look} {place}.",
    ],
    "doing": words(
        "eating resting humming waiting fishing knitting whistling yawning stretching sweeping drinking_tea "
        "laughing thinking mumbling dozing chewing"
    ),
    "meeting": [
        "There {he} met {pal}, a {mood} {pal_kind}.",
        "{Pal} the {pal_kind} was there too, {doing} in the sun.",
        "A {mood} {pal_kind} named {pal} was {doing} near a {look} {seat}.",
        "{His} friend {pal}, a {pal_kind}, came along, {doing} on the way.",
    ],
    "mood": words(
        "friendly sleepy hungry funny polite merry busy shy young wise nervous lucky "
        "bold calm clumsy dreamy playful serious thoughtful witty"
    ),
    "warning": [
        '"Be careful with that {thing}," said {pal} {softly}.',
        '"Watch out, {hero}!" {pal} called {softly}.',
        '"Slow down, or you will lose your {thing}," {pal} warned {softly}.',
        '"This {place} can be dangerous," {pal} said in a {mood} voice.',
    ],
    "sight": [
        "a {look} bird",
        "a {look} cloud",
        "a {look} butterfly",
        "some {mood} children",
        "a {mood} farmer",
        "a {mood} old man",
        "a {look} snail",
        "some {mood} bees",
    ],
    "conduct": ["But {hero} {fault}", "{Hero} {fault}", "But {hero} was {trait} and {fault}"],
    "fault": by_one("trait", {trait: faults for trait, (faults, _) in (CARELESS | SELFISH).items()}),
    "loss": ["Then {problem}.", "Suddenly {problem}!", "Bump! {Problem}.", "While {pal} was {doing}, {problem}."],
    "quarrel": [
        "They both wanted the {thing}. {Hero} {fault} They pulled and pulled until {problem}.",
        "{Pal} asked to hold the {thing}. But {hero} {fault} In the fight {problem}.",
        '"May I play with your {thing}?" asked {pal}. {Hero} {fault} Then, with a {look} noise, {problem}.',
    ],
    "sorrow": [
        "{Hero} felt {feeling} and a little {feeling_too}.",
        "{Hero} sat down on a {look} {seat} and cried.",
        '"Oh no, my {thing}!" {he} cried in a {mood} voice.',
        "{He} was so {feeling} that {he} did not even want {food}.",
        "Now {hero} was {feeling}, and {pal} looked {feeling_too}.",
    ],
    "feeling": words(
        "sad sorry ashamed upset afraid worried lonely angry hopeless tired miserable gloomy shaken confused"
    ),
    "feeling_too": words("cold small guilty silly alone helpless empty weak hurt pale sick shocked lost foolish"),
    "food": words(
        "cake soup apples honey bread cheese berries pancakes cookies pears jam nuts plums carrots pie corn "
        "dumplings grapes lemonade mushrooms noodles pudding rice waffles"
    ),
    "colour": words(
        "red blue green yellow white pink black purple brown golden silver grey crimson turquoise scarlet violet"
    ),
    "seat": words("stone log bench stump step box chair rug branch doorstep"),
    "help": [
        '"Do not worry," said {pal} {softly}. "We can use {remedy}." {manner} they {rescue}.',
        "But {pal} had {remedy}. {manner} the two of them {rescue}.",
        '"{exclaim}" said {pal} {softly}, and fetched {remedy}. {manner} they {rescue}.',
        "{Pal} ran home and came back with {remedy}. {manner} {pal_he} {rescue}.",
    ],
    "softly": words(
        "softly kindly loudly quickly quietly gently happily warmly firmly brightly shyly slowly proudly "
        "politely wisely sweetly"
    ),
    "exclaim": ["I have an idea!", "Let me help!", "I know what to do!", "Dry your tears!", "Wait here!"],
    "manner": [
        "Quickly",
        "With a {look} trick",
        "Singing a {look} song,",
        "With great care",
        "Slowly and carefully",
        "After a while",
        "With a little luck",
        "Before evening",
        "Step by step",
        "In no time",
    ],
    "rescue": by_one("problem", {problem: [*ends] for ends, cases in REPAIRS.items() for problem in cases}),
    "thanks": [
        '"Thank you, {pal}," said {hero} {softly}. "I am sorry."',
        "{Hero} hugged {pal} and brought some {food} and a {look} {gift}.",
        '"I was so {trait}," {hero} said. {Pal} smiled {softly}.',
        "{Hero} gave {pal} a {look} {gift} to say thank you.",
        "They shared some {food} and were friends again.",
    ],
    "gift": words(
        "shell button flower feather pebble picture song letter kiss coin poem ring spoon pencil mirror necklace"
    ),
    "crying": [
        "There {he} met {pal}, a {mood} {pal_kind}, who was crying.",
        "On a {look} {seat} sat {pal} the {pal_kind}, very {feeling}.",
        '"Help!" called a {mood} {pal_kind} named {pal}.',
        "{He} saw {pal}, a {pal_kind}, who looked {feeling} and had wet eyes.",
    ],
    "complaint": [
        '"I had a {colour} {thing}, but {problem}," said {pal}.',
        '"My {relative} gave me a {look} {colour} {thing}," {pal_he} said, "and then {problem}."',
        "{Pal} had lost {pal_his} {colour} {thing}. While {pal_he} was {doing}, {problem}.",
    ],
    "comfort": [
        "{Hero} {virtue}, smiling {softly}.",
        '{Hero} {virtue}. "{exclaim}" {he} said {softly}.',
        '{Hero} was {trait} and {virtue}. "Do not be {feeling}," {he} said.',
    ],
    "virtue": by_one("trait", {trait: virtues for trait, (virtues, _) in KIND.items()}),
    "deed": [
        "{He} found {remedy}. {manner} they {rescue}.",
        "{His} {relative} lent {him} {remedy}. {manner} {he} {rescue}.",
        "A {mood} neighbour had {remedy}. {manner} {hero} and {pal} {rescue}.",
        "{He} ran past {sight} and came back with {remedy}. {manner} {hero} {rescue}.",
    ],
    "reward": [
        "{Pal} was so happy that {pal_he} gave {hero} some {food} and a {look} {gift}.",
        '"Thank you, {hero}!" said {pal} {softly}, and gave {him} a {look} {gift}.',
        "They played with the {thing} until {time} and ate {food}.",
        "{Pal} danced with the {thing} and sang a {look} song.",
    ],
    "end": [
        "{Hero} learned that {moral}.",
        "From that {time} on, {hero} knew that {moral}.",
        "And {he} never forgot that {moral}.",
        '"Now I know that {moral}," said {hero} {softly}.',
        "{His} {relative} smiled and said that {moral}.",
    ],
}
