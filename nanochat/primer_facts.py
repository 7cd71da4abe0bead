"""The facts of the primer: colours, opposites, capitals and so on, each with the ways to tell and to ask it.

A `Topic` is one bounded set of facts; everything that the primer teaches and later quizzes as a fact is a
row of `TOPICS`. In its sentences and questions {key} and {value} are the fact (`primer_questions.fill`
knows the forms of a slot).

The choice that would surprise: within a topic a key has one right value, and no other value of that topic
fits it, because the wrong answers of a multiple-choice question are drawn from the topic's other values.
"""

from dataclasses import dataclass

from nanochat.primer_words import (
    ALPHABET,
    ANIMALS,
    CATEGORIES,
    DAYS,
    FOODS,
    MONTHS,
    PLURALS,
    THINGS,
    table,
    ways,
)

SOUNDS = table(
    "dog = woof; cat = meow; cow = moo; sheep = baa; pig = oink; duck = quack; hen = cluck; horse = neigh;"
    "owl = hoot; bee = buzz; frog = croak; snake = hiss; mouse = squeak; lion = roar; crow = caw;"
    "donkey = hee-haw; rooster = cock-a-doodle-doo; turkey = gobble; wolf = howl; pigeon = coo"
)
YOUNG = table(
    "dog = puppy; cat = kitten; cow = calf; horse = foal; sheep = lamb; pig = piglet; hen = chick; goat = kid;"
    "duck = duckling; bear = cub; deer = fawn; owl = owlet; goose = gosling; frog = tadpole; kangaroo = joey;"
    "swan = cygnet; butterfly = caterpillar; hare = leveret; eagle = eaglet; spider = spiderling"
)
HOMES = table(
    "bee = hive; spider = web; horse = stable; dog = kennel; bird = nest; rabbit = burrow; hen = coop;"
    "pig = sty; bear = cave; fox = den; ant = anthill; beaver = lodge; snail = shell"
)
LEGS = table(
    "dog = four; horse = four; cat = four; lion = four; hen = two; duck = two; owl = two; ant = six; bee = six;"
    "beetle = six; butterfly = six; spider = eight; scorpion = eight; crab = ten; snake = no; worm = no"
)
COLOURS = table(
    "a banana = yellow; a lemon = yellow; the sun = yellow; butter = yellow; a canary = yellow; mustard = yellow;"
    "a strawberry = red; a tomato = red; blood = red; a fire engine = red; a ladybird = red; a ruby = red;"
    "grass = green; a frog = green; a pea = green; a cucumber = green; a cactus = green; spinach = green;"
    "the sky = blue; the sea = blue; a sapphire = blue; a blueberry = blue; denim = blue;"
    "a carrot = orange; a pumpkin = orange; a tangerine = orange; an apricot = orange;"
    "snow = white; milk = white; salt = white; a swan = white; flour = white; chalk = white; a polar bear = white;"
    "coal = black; a raven = black; ink = black; the night = black; a panther = black;"
    "chocolate = brown; soil = brown; a chestnut = brown; coffee = brown; a walnut = brown;"
    "an elephant = grey; a dolphin = grey; ash = grey; a rain cloud = grey; lead = grey;"
    "a flamingo = pink; a piglet = pink; bubble gum = pink; an aubergine = purple; lavender = purple; a violet = purple"
)
_OPPOSITES = table(
    "hot = cold; big = small; tall = short; fast = slow; open = closed; happy = sad; light = dark; wet = dry;"
    "old = young; hard = soft; full = empty; loud = quiet; early = late; rich = poor; strong = weak;"
    "thick = thin; clean = dirty; near = far; high = low; day = night; left = right; up = down; in = out;"
    "yes = no; first = last; begin = end; buy = sell; push = pull; win = lose; love = hate; asleep = awake;"
    "sweet = sour; rough = smooth; wide = narrow; deep = shallow; brave = afraid; easy = difficult;"
    "true = false; above = below; inside = outside; give = take; question = answer"
)
OPPOSITES = {**_OPPOSITES, **{value: key for key, value in _OPPOSITES.items()}}
CAPITALS = table(
    "France = Paris; Germany = Berlin; Italy = Rome; Spain = Madrid; England = London; Ireland = Dublin;"
    "Portugal = Lisbon; Greece = Athens; Austria = Vienna; Poland = Warsaw; Norway = Oslo; Sweden = Stockholm;"
    "Finland = Helsinki; Denmark = Copenhagen; Russia = Moscow; Turkey = Ankara; Egypt = Cairo; Kenya = Nairobi;"
    "Japan = Tokyo; China = Beijing; Thailand = Bangkok; Vietnam = Hanoi; Cuba = Havana; Peru = Lima;"
    "Canada = Ottawa; Chile = Santiago; Hungary = Budapest; Belgium = Brussels; Iceland = Reykjavik;"
    "Scotland = Edinburgh; Wales = Cardiff; South Korea = Seoul; Iran = Tehran; Iraq = Baghdad; Ghana = Accra;"
    "Nepal = Kathmandu; Croatia = Zagreb; Bulgaria = Sofia; Romania = Bucharest; Australia = Canberra"
)
JOBS = table(
    "bakes bread = baker; grows corn = farmer; puts out fires = firefighter; flies a plane = pilot;"
    "teaches children = teacher; cuts hair = barber; mends teeth = dentist; sails a ship = sailor;"
    "paints pictures = painter; writes books = writer; builds walls = bricklayer; sews clothes = tailor;"
    "helps sick people = doctor; helps sick animals = vet; brings letters = postman; cooks meals = cook;"
    "mends pipes = plumber; sells meat = butcher; catches fish = fisherman; makes shoes = shoemaker;"
    "looks after books = librarian; digs for coal = miner; studies the stars = astronomer; works with wood = carpenter;"
    "drives a bus = driver; acts in plays = actor; shapes hot iron = blacksmith; plants flowers = gardener"
)
TOOLS = table(
    "cut paper = scissors; hit a nail = a hammer; sweep the floor = a broom; dig a hole = a spade;"
    "eat soup = a spoon; tell the time = a clock; saw wood = a saw; sew a button = a needle; comb hair = a comb;"
    "see the stars = a telescope; stay dry in the rain = an umbrella; brush teeth = a toothbrush;"
    "measure heat = a thermometer; draw a straight line = a ruler; open a lock = a key; boil water = a kettle;"
    "climb onto the roof = a ladder; paint a wall = a brush; cut bread = a knife; weigh flour = a scale;"
    "find north = a compass; turn a screw = a screwdriver; see tiny things = a microscope; water plants = a watering can"
)
SEASON_OF = table(
    "rake fallen leaves = autumn; build snowmen = winter; swim in the lake = summer; plant seeds = spring;"
    "see the first blossom = spring; skate on the ice = winter; pick ripe pumpkins = autumn; lie on the beach = summer;"
    "ride a sledge = winter; gather chestnuts = autumn; hear birds build nests = spring; gather the hay = summer"
)
PAST = table(
    "go = went; eat = ate; see = saw; run = ran; come = came; take = took; give = gave; sing = sang; write = wrote;"
    "swim = swam; drink = drank; fly = flew; sleep = slept; buy = bought; think = thought; bring = brought;"
    "catch = caught; teach = taught; find = found; make = made; hear = heard; speak = spoke; break = broke;"
    "grow = grew; know = knew; throw = threw; draw = drew; build = built; leave = left; keep = kept"
)
RHYMES = table(
    "cat = hat; dog = log; tree = bee; moon = spoon; star = car; house = mouse; rain = train; book = hook; cake = lake;"
    "king = ring; boat = goat; fish = dish; bed = red; sun = bun; night = light; bear = chair; nose = rose; sand = hand;"
    "fox = box; bell = shell; snow = crow; wall = ball; sail = snail; clock = sock"
)
UNPOETIC = {"rain", "sand", "bed", "snow", "night"}  # no poem can have "a rain"
DEFINITIONS = table(
    "lighthouse = a tall tower whose bright light shows ships the way; island = land with water all around it;"
    "library = a house full of books that anyone may borrow; mountain = a very high hill made of rock;"
    "river = a long stream of water that runs to the sea; desert = a dry land of sand where rain hardly falls;"
    "orchard = a garden of fruit trees; volcano = a mountain from which hot melted rock comes;"
    "rainbow = an arch of colours that appears when the sun shines through rain;"
    "compass = a tool with a needle that points north; calendar = a list of the days and months of the year;"
    "dictionary = a book that explains words; neighbour = a person who lives next door;"
    "bakery = a shop where bread is made; bridge = a road that crosses over water;"
    "harbour = a safe place where ships can rest; forest = a large place full of trees;"
    "secret = something that you tell to nobody; promise = a word that you give and must keep;"
    "friend = someone who likes you and stands by you; question = a sentence that wants an answer;"
    "alphabet = the row of letters from a to z; circle = a round line without a corner;"
    "triangle = a shape with three sides; recipe = a list of steps for making a dish;"
    "telescope = a tube of lenses that makes far things look near; orchestra = a large group of people who play music together;"
    "mirror = a smooth glass in which you see yourself; shadow = the dark shape that you make in the light;"
    "echo = your own voice that comes back from a wall; planet = a huge ball that travels around a star;"
    "moon = the bright ball that travels around the earth; cloud = many tiny drops of water floating in the air;"
    "wind = air that moves; ice = water that has frozen hard; steam = water that is so hot it floats away;"
    "computer = a machine that counts and remembers very fast; robot = a machine that can move and do work;"
    "program = a list of orders for a computer; language model = a program that reads much text and then writes its own;"
    "museum = a building that shows old and precious things; ticket = a small paper that lets you travel or enter;"
    "century = one hundred years; dozen = a group of twelve; orphan = a child without parents;"
    "hero = a person who does something brave; poem = a short text that plays with sounds and pictures;"
    "joke = a few words that make people laugh; nightmare = a bad dream; lullaby = a soft song that helps a baby sleep"
)
DETERMINERS = {"wind": "", "ice": "", "steam": "", "moon": "the ", "alphabet": "the "}


@dataclass(frozen=True)
class Topic:
    """One bounded set of facts. {key} and {value} stand for a fact."""

    title: str
    facts: dict[str, str]
    questions: tuple[str, ...]
    sentences: tuple[str, ...]  # each states the fact whole: lessons and answers are made of them


def _after(items: list[str]) -> dict[str, str]:
    """Each item and the one that follows, round in a circle."""
    return dict(zip(items, items[1:] + items[:1], strict=True))


def _turned(facts: dict[str, str]) -> dict[str, str]:
    """The same facts asked from the other end."""
    return {value: key for key, value in facts.items()}


TOPICS = {
    "colour": Topic(
        "Colours",
        COLOURS,
        ways(
            "What colour is {key}? | Which colour does {key} have? | Tell me the colour of {key}. | "
            "Do you know what colour {key} is? | What is the colour of {key}?"
        ),
        ways("{Key} is {value}. | The colour of {key} is {value}."),
    ),
    "opposite": Topic(
        "Opposites",
        OPPOSITES,
        ways(
            "What is the opposite of {key}? | Which word is the opposite of {key}? | "
            "What is not {key}, but the reverse? | Tell me the opposite of {key}. | "
            "If it is not {key}, what is it?"
        ),
        ways("The opposite of {key} is {value}. | It is {value}, the opposite of {key}."),
    ),
    "capital": Topic(
        "Capitals",
        CAPITALS,
        ways(
            "What is the capital of {key}? | Which city is the capital of {key}? | "
            "Name the capital of {key}. | Do you know the capital of {key}? | "
            "What is the main city of {key}?"
        ),
        ways("The capital of {key} is {value}. | {Value} is the capital of {key}."),
    ),
    "country": Topic(
        "Cities and their countries",
        _turned(CAPITALS),
        ways(
            "Which country has the capital {key}? | In which country is {key}? | Where is {key}? | "
            "{Key} is the capital of what?"
        ),
        ways("{Key} is the capital of {value}. | {Key} is in {value}."),
    ),
    "sound": Topic(
        "Animal sounds",
        SOUNDS,
        ways(
            "What does {a key} say? | Which sound does {a key} make? | How does {a key} sound? | "
            "What do you hear from {a key}?"
        ),
        ways("{A key} says {value}. | The sound of {a key} is {value}."),
    ),
    "young": Topic(
        "Young animals",
        YOUNG,
        ways(
            "What is a young {key} called? | What do we call a baby {key}? | "
            "What is the child of {a key}? | Which word means a little {key}?"
        ),
        ways("A young {key} is called {a value}. | A baby {key} is {a value}."),
    ),
    "home": Topic(
        "Where animals live",
        HOMES,
        ways(
            "Where does {a key} live? | What is the home of {a key}? | "
            "Where can you find {a key} at home? | What do we call the house of {a key}?"
        ),
        ways("{A key} lives in {a value}. | The home of {a key} is {a value}."),
    ),
    "legs": Topic(
        "Counting legs",
        LEGS,
        ways(
            "How many legs does {a key} have? | How many legs has {a key} got? | "
            "What is the number of legs of {a key}? | On how many legs does {a key} walk?"
        ),
        ways("{A key} has {value} legs."),
    ),
    "kind": Topic(
        "What kind of thing",
        {item: name for name, members in CATEGORIES.items() for item in members},
        ways(
            "What is {a key}? | What kind of thing is {a key}? | "
            "To which group does {a key} belong? | What sort of thing do we call {a key}?"
        ),
        ways("{A key} is {a value}."),
    ),
    "job": Topic(
        "People at work",
        JOBS,
        ways(
            "Who {key}? | Which person {key}? | Do you know who {key}? | "
            "What do you call someone who {key}?"
        ),
        ways("{A value} {key}. | Someone who {key} is {a value}."),
    ),
    "tool": Topic(
        "Useful things",
        TOOLS,
        ways(
            "What do you need to {key}? | What do people use to {key}? | "
            "What should I take to {key}? | Which thing helps me to {key}?"
        ),
        ways("To {key}, you need {value}. | People use {value} to {key}."),
    ),
    "season": Topic(
        "The seasons",
        SEASON_OF,
        ways(
            "In which season do we {key}? | When do we {key}? | Which season is it when we {key}? | "
            "What time of year do we {key}?"
        ),
        ways("We {key} in {value}. | In {value} we {key}."),
    ),
    "next day": Topic(
        "The days of the week",
        _after(DAYS),
        ways(
            "Which day comes after {key}? | What day follows {key}? | "
            "If today is {key}, what day is tomorrow? | Today is {key}. What will tomorrow be?"
        ),
        ways("After {key} comes {value}. | The day after {key} is {value}."),
    ),
    "last day": Topic(
        "The days, backwards",
        _turned(_after(DAYS)),
        ways(
            "Which day comes before {key}? | If today is {key}, what day was yesterday? | "
            "Today is {key}. What was yesterday? | What is the day before {key}?"
        ),
        ways("Before {key} comes {value}. | The day before {key} is {value}."),
    ),
    "next month": Topic(
        "The months of the year",
        _after(MONTHS),
        ways(
            "Which month comes after {key}? | What month follows {key}? | "
            "It is {key} now. Which month is next? | What is the month after {key}?"
        ),
        ways("After {key} comes {value}. | The month after {key} is {value}."),
    ),
    "last month": Topic(
        "The months, backwards",
        _turned(_after(MONTHS)),
        ways(
            "Which month comes before {key}? | What is the month before {key}? | "
            "It is {key} now. Which month was the last one? | Which month ends when {key} begins?"
        ),
        ways("Before {key} comes {value}. | The month before {key} is {value}."),
    ),
    "next letter": Topic(
        "The alphabet",
        dict(zip(ALPHABET, ALPHABET[1:], strict=False)),
        ways(
            "Which letter comes after {key}? | What letter follows {key}? | "
            "Which letter is next after {key} in the alphabet? | What is the letter after {key}?"
        ),
        ways("After {key} comes {value}. | The letter after {key} is {value}."),
    ),
    "next number": Topic(
        "Counting on",
        {str(number): str(number + 1) for number in range(100)},
        ways(
            "Which number comes after {key}? | What number follows {key}? | "
            "I count to {key}. What comes next? | What is one more than {key}?"
        ),
        ways("After {key} comes {value}. | The number after {key} is {value}."),
    ),
    "plural": Topic(
        "One and many",
        PLURALS,
        ways(
            "What is the plural of {key}? | One {key}, but two what? | "
            "What do we call more than one {key}? | I have one {key}. You have two what?"
        ),
        ways("One {key}, two {value}. | The plural of {key} is {value}."),
    ),
    "past": Topic(
        "Today and yesterday",
        PAST,
        ways(
            "What is the past of {key}? | Today I {key}. What did I do yesterday? | "
            "What is the word {key} in the past? | I {key} today. How do I say it of yesterday?"
        ),
        ways("Today I {key}, yesterday I {value}. | The past of {key} is {value}."),
    ),
    "rhyme": Topic(
        "Rhymes",
        RHYMES,
        ways(
            "Which word rhymes with {key}? | What rhymes with {key}? | Find a rhyme for {key}. | "
            "Tell me a word that sounds like {key}."
        ),
        ways("{Key} rhymes with {value}. | {Value} rhymes with {key}."),
    ),
}

# What is spelled and counted: a bounded set of known words, so that the letters of each can be learned.
SPELLED = sorted(
    {
        word
        for word in [*ANIMALS, *THINGS, *FOODS, *CATEGORIES["fruit"], *CATEGORIES["vegetable"]]
        if word.isalpha() and len(word) <= 8
    }
    | {"strawberry"}
)
