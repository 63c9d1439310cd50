"""Openings of movie reviews, combined from parts written for this example; none is from a data set.

They are neutral or mixed in tone, so that the sentiment of a review is the model's to choose.
Whole templates are held out: no held-out opening differs from a training one by its film alone.
"""

FILMS = (
    """
western|thriller about a missing pilot|documentary on deep-sea fishing|musical set in Lisbon
ghost story|comedy about two bakers|war drama|animated film about a heron|courtroom drama
science fiction film|road movie|silent short|film about a chess school|heist film
family drama|sequel|remake of a radio play|mystery set on a ferry|romance between two surveyors
horror film|biography of a painter|sports film about rowing|fantasy film|spy film
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

TRAINING = """
I watched this {film} last night and
The director of this {film} has
The first half of the {film} is
The plot of this {film} is
The acting in this {film} was
My overall impression of this {film} is that it
After two hours of this {film} I felt
The ending of the {film} made me
The script of this {film} tries to
The music in the {film} is
I went to see the {film} with my sister, and we
The lead actor in this {film} gives
As a {film}, this one is
The critics wrote a lot about this {film}, but I
The dialogue in this {film} sounds
What I remember most about this {film} is
The camera work in the {film} is
It took me three evenings to finish this {film} because
Compared with the book, the {film} is
The supporting cast of the {film} is
The editing of this {film} makes it
Halfway through the {film} I began to
My friends and I talked about the {film}, and we think it
The opening scene of the {film} was
I had no expectations of this {film}, and it
The studio describes this {film} as
The pace of the {film} is
Watching the {film} a second time, I found it
The main character of this {film} seems
The story behind this {film} is
The audience at the {film} was
For a low-budget {film}, this is
The costumes and sets of the {film} look
If you are thinking about seeing this {film}, you should know it is
I would describe this {film} as
The last scene of this {film} leaves
On the way home from the {film} I thought it was
The humour in this {film} is
This is the third {film} from the same team, and it
The trailer for the {film} promised one thing, and the film is
The emotional parts of this {film} are
Of everything shown at the festival, this {film} was
The narrator of the {film} is
My review of this {film} in one word is
The friendship at the heart of the {film} is
People keep asking me about this {film}, and I tell them it is
The sound design of the {film} is
Some parts of this {film} are
""".strip().splitlines()

HELD_OUT = """
When the lights came up after the {film}, I was
The screenplay of the {film} feels
Everyone in my office saw this {film}, and they
The performances in this {film} are
To be honest, this {film} is
Two days after the {film} I still
The visual style of this {film} is
I paid full price for this {film}, and it
""".strip().splitlines()

FILMS_PER_TEMPLATE = 12


def training_openings() -> list[str]:
    """576 openings, twelve films to a template."""
    return combine(TRAINING)


def held_out_openings() -> list[str]:
    """96 openings of other templates."""
    return combine(HELD_OUT)


def combine(templates: list[str]) -> list[str]:
    """Each template with every second film, alternating, so that neighbours share none."""
    return [
        template.format(film=FILMS[(2 * n + number) % len(FILMS)])
        for number, template in enumerate(templates)
        for n in range(FILMS_PER_TEMPLATE)
    ]
