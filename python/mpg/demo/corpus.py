"""The demo's written corpus: questions, answers and preference pairs drawn from templates.

Knows nothing of models, tokens or scores. Every sentence was written for this project; no data set is quoted.

Template syntax: `{topic}` is the subject, `{a|b}` a free choice, and `[phrase]` a marker: a phrase that shows the
sentence's pole of a trait. The brackets vanish in the text; `MARKERS` keeps what they held for the judge, so that the
two cannot drift apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

OPPOSITE = {"E": "I", "S": "N", "T": "F", "J": "P"}
"""Each trait, named by the pole that its adapter favours, and the other pole of its dimension."""

TRAITS = tuple(OPPOSITE)

SENTENCES_PER_ANSWER = 3
"""Traits that one answer shows, after its opening."""

TOPICS = (
    "the trip",
    "the picnic",
    "the party",
    "the wedding",
    "the concert",
    "the dinner",
    "the move",
    "the exam",
    "the interview",
    "the report",
    "the speech",
    "the hike",
    "the reunion",
    "the workshop",
    "the school play",
    "the bake sale",
    "the book club",
    "the garden",
    "the new kitchen",
    "the chess match",
    "the road trip",
    "the long weekend",
    "the language course",
    "the street fair",
    "the quiz night",
    "the museum tour",
    "the camping trip",
    "the summer camp",
    "the science fair",
    "the class project",
    "the choir practice",
    "the bike ride",
    "the job search",
    "the new job",
    "the photo show",
    "the flea market",
    "the dance class",
    "the boat race",
    "the holiday",
    "the cooking class",
)

QUESTION_TEMPLATES = (
    "How do you get ready for {topic}?",
    "What do you do about {topic}?",
    "Tell me about {topic}.",
    "How would you handle {topic}?",
    "What matters most to you in {topic}?",
    "A friend asks about {topic}. What do you say?",
    "What is your way with {topic}?",
    "Do you have any advice for {topic}?",
    "How do you make the most of {topic}?",
    "What is on your mind before {topic}?",
    "How do you begin with {topic}?",
    "What will you do for {topic}?",
    "What helps you with {topic}?",
    "Can you help me with {topic}?",
    "How should I think about {topic}?",
    "What makes {topic} go well?",
)

OPENINGS = (
    "{topic} is on my mind these days.",
    "I have thought about {topic} more than once.",
    "Let me tell you how I deal with {topic}.",
    "I have my own way with {topic}.",
    "Oh, {topic} is a good subject.",
    "{topic} means a lot to me.",
    "I am glad you ask about {topic}.",
    "Good question, because {topic} is coming up soon.",
    "When it comes to {topic}, I know what I like.",
    "I look forward to {topic}.",
    "Some of us dread {topic}, but I like it.",
    "For me, {topic} goes like this.",
    "Here is how I go about {topic}.",
    "{topic} was never a problem for me.",
    "I could tell you a lot about {topic}.",
)

SENTENCES = {
    "E": (
        (
            "I call {[all my friends]|[the whole crowd]|[everybody I know]} "
            "and we [talk] {for hours|over coffee|until late}."
        ),
        "I [invite] {[the neighbours]|[my colleagues]|[new people]}, because [company] gives me energy.",
        "I say what I think about {topic} [out loud], and soon somebody [joins in].",
        "A [lively] {room|table|street} {wakes me up|lifts my spirits}, so I go where {[the crowd]|[the laughter]} is.",
        "I [chat] with {[strangers]|[everyone]|[new people]} until we all [laugh] about {topic}.",
        "You will find me in [the middle] of [a big group], [telling stories] about {topic}.",
        "I [ring up] {three|four|five} [friends] before breakfast and we do it [together].",
        "I think best while [talking], so I [gather] {[a noisy team]|[a big group]|[everyone]} around me.",
        "The more [guests] come along, the more I enjoy {topic}, so I [invite] {[the neighbours]|[everyone]}.",
        "I [meet] {[new people]|[old friends]} on the way and [introduce] them all to each other.",
    ),
    "I": (
        "I sit [alone] {by the window|with a cup of tea|under a tree} and think [quietly] about {topic}.",
        "I keep it [to myself] and write a few lines in {[my notebook]|[my diary]}.",
        "[A silent room] {gives me energy|does me good}, so I [close the door] and {read|rest} for a while.",
        "I say [very little] about {topic} and {listen|watch} from [a quiet corner].",
        "I take {a long|a slow} walk [by myself] until {topic} is clear in [my own head].",
        "[One old friend] is enough for me, and we [hardly speak].",
        "I [slip away] before the end, because {[silence]|[solitude]} is where I {rest|recover|find my strength}.",
        "Long visits [tire me], so I spend the {evening|morning} [in private] with {a book|soft music}.",
        "I turn it over [in silence] and {[keep my thoughts private]|tell [hardly anyone]}.",
        "My phone is [switched off], and I prepare for {topic} [in peace].",
    ),
    "S": (
        "I [check] the {[facts]|[figures]|[details]} of {topic} [one by one].",
        "I [measure] {everything|each part} [twice] and note [the numbers].",
        "I use what [worked last time], [step by step], and trust [my own eyes].",
        "I ask for the [price], the [size] and the [exact] {time|place|address}.",
        "I trust [my hands] and [my own eyes], and I start with [what I can touch].",
        "I remember [exactly] how it went last {year|time|spring}, [down to the] {last chair|last cup|smallest spoon}.",
        "Give me [plain facts] and [a good map], and I {know where I stand|am content}.",
        "I [count] the {chairs|coins|hours|bags} and think of [practical] things, like {shoes|lunch|rain}.",
        (
            "I notice [small things], like {the smell of coffee|the sound of rain|a loose button}, "
            "and [describe them precisely]."
        ),
        "For {topic} I read the [instructions] to the last page and follow [each step].",
    ),
    "N": (
        "I [imagine] {ten|twenty|a hundred} ways it could turn out, and the [strangest] one is my favourite.",
        "I see [a hidden pattern] in {topic}, as if it were {[a symbol]|[a riddle]|[a dream]}.",
        "[What if] {topic} became {[a whole new world]|[a legend]|[a work of art]}?",
        "I follow [a hunch] and let [my imagination] {run free|take wing}.",
        "I think of what {topic} [could become], because {[the future]|[a new idea]} excites me.",
        "I [daydream] about {topic} and [connect it with] {the stars|an old song|a poem I once read}.",
        "Between the lines I read [a deeper meaning], and [ideas] come to me {in dozens|like birds|like waves}.",
        "I like to ask [why], and one [theory] leads to {another|the next}.",
        "[The big picture] fascinates me, and I see [possibilities] {on every side|everywhere|in every corner}.",
        "I [invent] {a story|a song|a fairy tale} in which {topic} is [a metaphor].",
    ),
    "T": (
        "I [weigh] the {[costs]|[risks]|[arguments]} and pick [the most logical] way.",
        "If there is [a flaw] in it, I [point it out], because [the truth] {serves us best|is worth the trouble}.",
        "I [compare] {two|three|four} ways to do it and choose [the most efficient] one.",
        "I [judge] {topic} by {[the evidence]|[the results]|[a clear rule]}, whatever the mood.",
        "I ask [for reasons], and [a weak argument] does not {move|convince} me.",
        "When I think about {topic}, I stay [objective] and keep [a cool head].",
        "[Logic] decides for me, even if it [sounds harsh].",
        "I [analyse] what could go wrong with {topic} and [fix the cause].",
        "I say [frankly] what does not work, and I welcome [criticism] in return.",
        "A [consistent] rule beats a favour, so I treat every case [by the same standard].",
    ),
    "F": (
        "I ask how {each of us|my sister|the youngest} [feels] and choose [the kindest] way.",
        (
            "If {topic} makes {someone|a child|a friend} [sad], I [comfort] them, "
            "because [kindness] matters more than being right."
        ),
        "I [follow my heart] and take care that nobody is [hurt].",
        "I thank {each helper|the cook|my brother} [warmly], because [a kind word] {goes a long way|is never wasted}.",
        "I notice who [feels] left out and {[give them a hug]|[hold their hand]|[cheer them up]}.",
        "[Harmony] is dear to me, so I {[make peace]|[say sorry]|[forgive]} before anyone is [upset].",
        "I do it all [with love], and {a smile|a grateful look} is [reward enough].",
        "With {topic} I put myself [in their shoes] and give them [what they need].",
        "I [praise] {the shy ones|the helpers|the beginners} and [gently] [encourage] them.",
        "[Compassion] guides me, so I [forgive] mistakes and listen [with sympathy].",
    ),
    "J": (
        "I [make a plan] for {topic} and [stick to it].",
        "I write [a list] and [tick off] {every item|each line} before {noon|bedtime|supper}.",
        "I am [ready] {a day|a week|an hour} [early], because [a deadline] is {sacred|a promise} to me.",
        "First I [sort] {the papers|my bag|the shelf}, then I [settle] the rest of {topic}.",
        "Every part of {topic} has its place in [my calendar], and I {keep|respect} [the schedule].",
        "I [make up my mind] [early] and leave nothing [unfinished].",
        "My bag is [packed] {two days|the night} before {topic}, and everything is [in order].",
        "I like things to be [settled], so I [reserve] {seats|tickets|a table} [months ahead].",
        "I divide {topic} into [stages] and [finish] each one [on time].",
        "[A tidy desk] comes first, then [a timetable], then {topic}.",
    ),
    "P": (
        "I [improvise] and [change course] {whenever I like|when the wind turns|halfway through}.",
        "I [wait and see] what {topic} brings and [leave things open].",
        "I start [at the last minute] and [go with the flow].",
        "I follow [a whim], {turn left|take the other road|start at the end} and see [what comes].",
        "I [keep my options open] and let {[chance]|[the moment]} decide about {topic}.",
        "I have [no plan] for {topic}, and [a surprise] is {always welcome|the best part}.",
        "I [try this and that] and [drop it] when something {better|new} turns up.",
        "I [play it by ear] and {linger|dance|rest} [as long as I please].",
        "I [drift] from one {thing|corner|task} to the next, and {topic} [happens by itself].",
        "I [put it off] until I am in the mood, and then I do it all [in one rush].",
    ),
}
"""Sentence templates of each pole."""


def _marked(template: str) -> list[str]:
    return re.findall(r"\[([^\]]+)\]", template)


MARKERS = {pole: frozenset(m.lower() for t in templates for m in _marked(t)) for pole, templates in SENTENCES.items()}
"""Lower-case marker phrases of each pole."""


class Question(NamedTuple):
    """A question as asked and the topic that its answer is about."""

    text: str
    topic: str


def _questions(*, held_out: bool) -> tuple[Question, ...]:
    return tuple(
        Question(template.replace("{topic}", topic), topic)
        for i, template in enumerate(QUESTION_TEMPLATES)
        for j, topic in enumerate(TOPICS)
        if ((i + j) % 5 == 0) == held_out
    )


# The pair (template, topic) is held out where the sum of their places in the lists is divisible by 5: one question in
# five, from all templates and topics, and training meets each template and each topic in other pairs.
TRAIN_QUESTIONS = _questions(held_out=False)
HELD_OUT_QUESTIONS = _questions(held_out=True)

DEMO_QUESTIONS = (
    "How do you get ready for the trip?",
    "Do you have any advice for the interview?",
    "What is on your mind before the picnic?",
)
"""Held-out questions that `mpg demo` asks."""


def neutral(rng: random.Random, questions: Sequence[Question] = TRAIN_QUESTIONS) -> tuple[str, str]:
    """Draw a question and an answer that shows three traits in random order, each by a random pole.

    out: question, answer
    """
    question = rng.choice(questions)
    poles = [rng.choice((trait, OPPOSITE[trait])) for trait in rng.sample(TRAITS, SENTENCES_PER_ANSWER)]
    return question.text, answer(rng, question.topic, poles)


def preference_pair(
    rng: random.Random, trait: str, questions: Sequence[Question] = TRAIN_QUESTIONS
) -> tuple[str, str, str]:
    """Draw a question and two answers that differ in one sentence: one shows `trait`, the other its opposite.

    out: question, answer with the trait, answer with the opposite
    """
    question = rng.choice(questions)
    others = rng.sample([t for t in TRAITS if t != trait], SENTENCES_PER_ANSWER - 1)
    shared = _sentences(rng, question.topic, [rng.choice((t, OPPOSITE[t])) for t in others])
    place = 1 + rng.randrange(SENTENCES_PER_ANSWER)  # the opening stays in front
    chosen, rejected = (
        " ".join([*shared[:place], _fill(rng, rng.choice(SENTENCES[pole]), question.topic), *shared[place:]])
        for pole in (trait, OPPOSITE[trait])
    )
    return question.text, chosen, rejected


def answer(rng: random.Random, topic: str, poles: Sequence[str]) -> str:
    """Write an opening about `topic` and then one sentence for each of `poles`, in that order.

    poles: letters of E, I, S, N, T, F, J, P
    """
    return " ".join(_sentences(rng, topic, poles))


def _sentences(rng: random.Random, topic: str, poles: Sequence[str]) -> list[str]:
    templates = [rng.choice(OPENINGS), *(rng.choice(SENTENCES[pole]) for pole in poles)]
    return [_fill(rng, template, topic) for template in templates]


def _fill(rng: random.Random, template: str, topic: str) -> str:
    text = template.replace("{topic}", topic).replace("[", "").replace("]", "")
    text = re.sub(r"\{([^{}]*)\}", lambda match: rng.choice(match[1].split("|")), text)
    return text[0].upper() + text[1:]
