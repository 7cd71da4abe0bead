"""The words of the primer: who and what there is in its small world, as tables to read and extend.

`words("one, two")`, `ways("one | two")` and `table("key = value; ...")` keep the lists short enough to be
read; `a` and `plural` put a noun into its form.

The choice that would surprise: no word here is rare. Every name, animal and thing comes back hundreds of
times in a few megabytes, since a model of a million parameters learns a word from many meetings.
"""


def words(text: str) -> list[str]:
    """The items of a comma-separated list: `words("cat, dog")` -> `["cat", "dog"]`."""
    return [" ".join(item.split()) for item in text.split(",")]


def table(text: str) -> dict[str, str]:
    """The rows of a `key = value; key = value` text, in order."""
    rows = (row.split("=") for row in text.split(";"))
    return {" ".join(key.split()): " ".join(value.split()) for key, value in rows}


def ways(text: str) -> tuple[str, ...]:
    """The alternatives of a text: `ways("Hi! | Hello!")` -> `("Hi!", "Hello!")`."""
    return tuple(way.strip() for way in text.split("|"))


def a(noun: str) -> str:
    """The noun with its article: `a("owl")` -> `"an owl"`."""
    return (
        f"an {noun}" if noun[0].lower() in "aeiou" and not noun.startswith("uni") else f"a {noun}"
    )


def plural(noun: str) -> str:
    """The plural of a noun: `plural("fox")` -> `"foxes"`."""
    if noun in PLURALS:
        return PLURALS[noun]
    if " of " in noun:
        return plural(noun[: noun.index(" of ")]) + noun[noun.index(" of ") :]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


GIRLS = words(
    "Anna, Mia, Lily, Rosa, Emma, Nora, Zoe, Clara, Ida, Lucy, Maya, Ruth, Ella, Hana, June"
)
BOYS = words(
    "Tom, Ben, Max, Leo, Sam, Oscar, Finn, Jack, Omar, Peter, Hugo, Noah, Paul, Theo, Ravi"
)
RELATIVES = words("mother, father, grandmother, grandfather, aunt, uncle, sister, brother")
PLACES = words(
    "the river, the old mill, the forest, the garden, the beach, the market, the harbour, the park, the "
    "bridge, the hill, the library, the farm, the village square, the pond, the lighthouse, the meadow, "
    "the station, the castle ruins"
)
THINGS = words(
    "ball, hat, kite, book, scarf, drum, key, cup, umbrella, basket, lantern, whistle, ring, map, coin, "
    "pencil, blanket, bell, mirror, button, necklace, toy boat, paintbrush, marble, ribbon, compass"
)
FOODS = words(
    "bread, cheese, soup, cake, honey, porridge, rice, apple pie, toast, plum jam, popcorn, pasta, "
    "warm milk, jelly, custard, fruit salad, stew, chocolate, pudding, fresh butter"
)
DISHES = words("apple pie, plum cake, gingerbread, pizza, bread, carrot cake, onion soup, lasagne")
FEELINGS = words("happy, proud, tired, curious, brave, calm, sleepy, cheerful, thankful, hopeful")
DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = words(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)
MONTHS_OF = table(
    "spring = March, April, May; summer = June, July, August; "
    "autumn = September, October, November; winter = December, January, February"
)
WEATHERS_OF = table(
    "spring = sunny, rainy, windy, mild, fresh; summer = sunny, warm, dry, hot, stormy, bright; "
    "autumn = foggy, cloudy, misty, windy, cool, rainy; winter = snowy, frosty, cold, grey, icy"
)
NUMBERS = words(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, "
    "fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty"
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

# From the smallest to the largest, far enough apart that nobody argues.
SIZES = words("ant, bee, mouse, frog, rabbit, fox, sheep, lion, horse, elephant, whale")

CATEGORIES = {
    name: words(members)
    for name, members in table(
        "fruit = apple, pear, banana, cherry, plum, peach, grape, lemon, mango, melon;"
        "vegetable = carrot, potato, onion, cabbage, turnip, cucumber, leek, radish, pea;"
        "bird = owl, robin, eagle, parrot, swan, sparrow, crow, gull, penguin, stork;"
        "fish = salmon, trout, shark, herring, cod, eel, carp, sardine;"
        "insect = ant, bee, beetle, moth, fly, wasp, cricket, ladybird;"
        "flower = rose, tulip, daisy, lily, poppy, violet, daffodil, sunflower;"
        "tree = oak, birch, maple, pine, willow, elm, chestnut;"
        "vehicle = car, bus, train, bicycle, lorry, tram, ship, plane;"
        "piece of clothing = shirt, coat, sock, glove, jacket, dress, skirt, sweater, apron;"
        "musical instrument = piano, violin, flute, drum, trumpet, guitar, harp, cello;"
        "piece of furniture = table, chair, bed, sofa, desk, shelf, wardrobe, bench;"
        "part of the body = nose, ear, elbow, knee, finger, shoulder, chin, thumb, ankle;"
        "shape = circle, square, triangle, rectangle, oval;"
        "metal = iron, gold, silver, copper, tin;"
        "building = house, school, church, castle, hotel, museum, tower, barn"
    ).items()
}

NATURE = table(
    "dog = wags its tail when it is glad and guards the house; cat = sleeps most of the day and sees well at night;"
    "cow = chews grass and gives us milk; horse = can gallop and sleeps standing up;"
    "sheep = has a thick coat of wool; pig = is clever and rolls in the mud to stay cool;"
    "hen = lays eggs and scratches for seeds; duck = has feathers that keep out the water;"
    "goat = climbs steep rocks and eats nearly anything; fox = has a bushy tail and hunts at night;"
    "bear = loves honey and sleeps through the winter; wolf = lives in a pack and howls at the moon;"
    "lion = has a golden mane and rests in the shade; tiger = has black stripes and swims very well;"
    "elephant = has a long trunk and a wonderful memory; mouse = is tiny and nibbles seeds and cheese;"
    "rabbit = has long ears and hops across the meadow; squirrel = hides nuts and forgets where they are;"
    "owl = turns its head far round and hunts without a sound; bee = carries pollen and makes honey;"
    "ant = carries loads far heavier than itself; spider = spins silk and waits for flies;"
    "frog = catches insects with a sticky tongue; snake = has no legs and smells with its tongue;"
    "snail = carries its house and leaves a silver trail; whale = breathes air and sings under the sea;"
    "penguin = cannot fly but swims like an arrow; kangaroo = jumps far and keeps its baby in a pouch;"
    "giraffe = has a very long neck and eats leaves from tall trees; zebra = has stripes, each pattern different;"
    "camel = stores fat in its hump and crosses the desert; monkey = swings through the branches by its arms;"
    "hedgehog = rolls into a prickly ball when it is afraid; bat = flies at night and sleeps upside down;"
    "turtle = has a hard shell and lives a very long time; octopus = has eight arms and three hearts;"
    "beaver = builds dams from branches and mud; swan = glides on the lake and has a graceful neck;"
    "parrot = has bright feathers and copies what people say; butterfly = begins its life as a caterpillar;"
    "dolphin = leaps out of the waves and plays with its friends; deer = runs swiftly and hides among the trees"
)
ANIMALS = list(NATURE)
PLURALS = table(
    "mouse = mice; goose = geese; foot = feet; tooth = teeth; man = men; woman = women; child = children;"
    "ox = oxen; leaf = leaves; wolf = wolves; knife = knives; loaf = loaves; shelf = shelves; sheep = sheep;"
    "fish = fish; deer = deer; potato = potatoes; tomato = tomatoes; calf = calves; half = halves"
)
