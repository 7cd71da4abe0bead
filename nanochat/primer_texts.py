"""The stories, pages and small talk of the primer, as templates to read and extend.

`[one way|another way]` is a choice, `{slot}` a word that the writer fills in, `{Slot}` the same with a
capital, `{a slot}` with its article, `{s slot}` in the plural (`primer_questions.fill` does all of it). Each story is
a list of sentences that share one hero, one friend, one animal, one place and one thing.

The choice that would surprise: questions hold no `[...]` choices. A phrasing is a unit that is either taught
or kept for the test (see `primer_questions.held_out`), so it must be one text.
"""

from nanochat.primer_words import ways

STORIES = {
    "The Lost {Thing}": (
        "[One morning|One {weather} day|Last {day}], {hero} could not find {his} {colour} {thing}.",
        "{He} looked [under the bed|behind the door|in the cupboard|beneath the stairs], but it was not there.",
        '"Have you seen my {thing}?" {he} asked {friend}.',
        '[{Friend} shook {friend_his} head. "Let us search together," {friend_he} said.|"No, but I will help you," said {friend}.]',
        "They walked to {place} and [looked behind every stone|asked everyone they met|followed the path very slowly].",
        "There sat {a animal}, and right beside it lay the {thing}!",
        '"[Thank you, clever {animal}|You are a fine finder, little {animal}]!" [laughed|cried|said] {hero}.',
        "[From that day on, {he} kept the {thing} in a safe place.|That night {he} slept with the {thing} next to {his} pillow.]",
    ),
    "{Hero} and the Little {Animal}": (
        "{Hero} was [walking|playing|singing] near {place} when {he} heard a [small|sad|strange] cry.",
        "It was {a animal} that had [hurt its leg|lost its mother|fallen into a ditch].",
        '"[Do not be afraid|Do not worry], I will help you," {he} whispered.',
        "{He} wrapped the {animal} in {his} [coat|scarf|warm blanket] and carried it home.",
        "{His} {relative} [gave it some water|made a soft bed of straw|knew just what to do].",
        "After [three|four|five] days the {animal} was [well|strong] again, and {hero} set it free.",
        "[But every {day} it comes back to say hello.|It looked back once, as if to say thank you.|{He} was a little sad and very {feeling}.]",
    ),
    "Something Good for {Elder}": (
        "[It was {Elder}'s birthday|{Elder} was ill in bed], so {hero} and {friend} wanted to make {dish}.",
        "They [put on aprons|washed their hands|opened the big cookbook] and took out [a bowl and a spoon|flour, salt and sugar].",
        "But {friend} [took salt for sugar|forgot the oven|spilled the milk], and the first try tasted [terrible|like old socks|of smoke].",
        '"[Never mind|Everyone makes mistakes]," said {hero}. "[We will try again|Now we know how not to do it]."',
        "The second time the {dish} was [perfect|golden and warm|simply wonderful].",
        "{Elder} [ate two plates|smiled from ear to ear|asked for more] and felt {feeling}.",
    ),
    "The Storm": (
        "[At night|In the evening] a [great|wild|terrible] storm came over {place}.",
        "Thunder [rolled|crashed] and lightning [lit the sky|flashed at the window], and {hero} hid under the blanket.",
        "{His} {relative} sat down on the bed and lit a [candle|small lamp].",
        '"[Thunder is only the voice of the lightning|The storm is only washing the world]," said {his} {relative}. "[Count with me until it comes|Let us sing until it is over]."',
        "{Hero} counted: one, two, three, four, five. Each time the thunder was [farther away|softer].",
        "In the morning [the sun shone|the air smelled fresh] and {a thing} hung in the [apple tree|old oak].",
        '{Hero} laughed. [The storm had brought {him} a present.|"Even the wind forgets its things," {he} said.]',
    ),
    "The Slow One and the Fast One": (
        "A [hare|horse|deer] and a [snail|turtle|hedgehog] [met|argued] near {place}.",
        '"Nobody is as fast as I am," said the fast one. "[Let us race to the hill|You will never win]!"',
        "The fast one ran [like the wind|like lightning], then [lay down for a nap|stopped to look at itself in the water].",
        "The slow one went on, step by step, [and never stopped|humming a quiet song].",
        "When the fast one [woke up|looked up], the slow one was already [at the end|on top of the hill].",
        '"[Slow steps are still steps|A little every minute is a lot every day]," said the slow one, and [smiled|ate a leaf].',
    ),
    "The Seed": (
        "In [spring|April|March] {hero} planted a tiny seed near {place}.",
        "{He} gave it water every {day} and [talked to it kindly|told it the news|sang it a song].",
        'One week passed, then two, and nothing [happened|could be seen]. "[Be patient|Good things take time]," said {friend}.',
        "Then a [small green|thin pale] leaf came out of the earth.",
        "By summer it was a [sunflower|bean plant|young tree], taller than {hero}'s {relative}!",
        "[{Hero} gave the new seeds to {friend}, and the next year there were two gardens.|{A animal} sat in its shade and {hero} felt {feeling}.]",
    ),
    "Half for You": (
        "{Hero} sat [near|by] {place} with [a plate of|some] {food}.",
        "{Friend} came by and [looked hungry|had nothing to eat].",
        '"[Would you like some|Are you hungry]?" asked {hero}. "[Half is for you|We can share]."',
        "They ate together, and [even {a animal} got the crumbs|talked until the sun went down].",
        '"It tastes better [with a friend|when you share it]," said {friend}.',
        "[The next day {friend} brought {a colour} {thing} for {hero}.|And {hero} thought so too.]",
    ),
    "The Little Boat": (
        "{Hero} and {friend} built a boat from [planks|an old barrel|a wooden door] and [a white|{a colour}] sail.",
        "They sailed [across the bay|down the river|over the quiet lake] until they came to an island.",
        "On the island lived {a animal} that [wore a hat|could whistle|collected {s thing}].",
        '"[Welcome|Good day, travellers]!" it said. "[Nobody has visited me for a year.|Will you have some {food}?]"',
        "They [danced|told stories|played cards] until the [moon|first star] came up.",
        'Then they sailed home, and {his} {relative} asked, "Where have you been?" "[Only at sea|You would not believe it]," said {hero}.',
    ),
    "The Noise in the Night": (
        "In the middle of the night {hero} heard a noise: [bump, bump, bump|scratch, scratch|tap, tap, tap].",
        "{He} took {his} [lamp|candle|torch] and went [down the stairs|along the dark hall] on bare feet.",
        '{His} heart beat [like a drum|very fast]. "Who is there?" {he} asked.',
        "[Nobody answered|It was silent for a moment]. Then something {colour} moved behind the [curtain|clock|chair].",
        "It was only {a animal} that wanted some {food}!",
        "{Hero} gave it a little, and both went to sleep, [warm and {feeling}|one in bed and one below it].",
    ),
    "The Coin": (
        "{Hero} had one [silver|golden|shiny] coin and went to {place} to spend it.",
        "{He} saw [sweets|balloons|a carved whistle] and {a thing} of {colour} glass, and could not decide.",
        "Then {he} met {friend}, who was [crying|sitting alone], because {friend_his} {thing} was [broken|gone].",
        "{Hero} thought for a [moment|long minute] and bought a new {thing} for {friend}.",
        '{He} came home with empty pockets. "What did you buy?" asked {his} {relative}.',
        '"[A friend|Something that does not fit in a bag]," said {hero}, and felt {feeling}.',
    ),
    "The New Child in School": (
        "On {day} a new child came to school. {Friend_his} name was {friend}.",
        "{Friend} [sat alone|looked at the floor] and said [nothing|not a word].",
        '{Hero} [moved {his} chair|waved] and said, "You can sit with me. Do you like {s animal}?"',
        '"[I love {s animal}|{S animal} are my favourite]!" said {friend}, and [took out a drawing|began to smile].',
        "In the break they [played with {a thing}|shared some {food}|climbed the old tree] and laughed.",
        '[Now they walk home together every {day}.|"I was new once, too," said {hero}.]',
    ),
    "The Machine That Learned to Read": (
        "Near {place} there stood a small computer that nobody used.",
        '{Hero} gave it [a school book|a page to read] and said, "Please learn this."',
        "At first it wrote only [nonsense|the letter e], but it read the book again and again.",
        'After [a thousand|many] tries it wrote: "[Hello, {hero}|Good morning]. What colour is your {thing}?"',
        '"It is {colour}!" said {hero}. "[You can talk|You have learned it]!"',
        '"[I am still very small|I make mistakes]," wrote the machine, "but I like to [learn|talk with you]."',
    ),
    "Counting the Stars": (
        "On a [clear|warm|quiet] night {hero} and {his} {relative} lay in the grass near {place}.",
        '"How many stars are there?" asked {hero}. "[More than we can count|Begin, and tell me tomorrow]," said {his} {relative}.',
        "{Hero} counted to [twenty|one hundred], and then {a animal} [called from the dark|ran over {his} feet].",
        "{He} laughed and had to begin again: one, two, three.",
        "One star fell, and {he} made a wish. [It was about {a thing}.|{He} told it to nobody.]",
        "{He} was asleep before {he} came to ten, [{feeling} under the sky|with the moon on {his} face].",
    ),
}

# Short enough for a reply: the hero is the animal that was asked for.
FABLES = (
    (
        "There was once a [small|clever|lonely] {animal} that lived near {place}.",
        "[Every {day}|One {weather} day] it [looked for|dreamed of] {food}, but found only {a thing}.",
        "It gave the {thing} to [a child|an old man|a passing traveller] and got {food} for it.",
        "So the {animal} went home {feeling}, and [shared it with everyone|slept very well].",
    ),
    (
        "A young {animal} wanted to see the world, so it left {place} one {weather} morning.",
        "It [walked and walked|travelled for three days] until it met {hero}.",
        '"[You look tired|You are far from home]," said {hero}. "Come in and have some {food}."',
        "The {animal} stayed the night, and they have been friends ever since.",
    ),
    (
        "Once {a animal} found {a colour} {thing} near {place}.",
        '"[It is mine|Finders keepers]," it said, and [hid it|carried it away].',
        "But {a thing} is no fun alone, so it [called|asked] {hero} to play.",
        "Then both were {feeling}, and the {thing} belonged to [everyone|both].",
    ),
)

LETTERS = (
    "Dear {friend},\n[how are you?|I hope you are well.] [I am at my {relative}'s house|We are staying near {place}]. The weather is {weather}. "
    "Yesterday I saw {a animal} and we ate {food}. [I lost my {thing}, but I found it again.|I have bought {a thing} for you.] "
    "[Please write soon|I will come home on {day}|I miss you].\n[Yours|Your friend|With love],\n{hero}",
    "Dear {relative},\nthank you for the {colour} {thing}. [It is the best present of all|I take it everywhere]! "
    "{Friend} wants one too. On {day} we [took it to {place}|showed it to the whole class]. [I am {feeling} now.|Even the {animal} likes it.]\n[Love|Many kisses],\n{hero}",
    "Note for {friend}:\n[I have gone to {place}.|I am out until noon.] The {food} is [on the table|in the oven]. Please feed the {animal} and [close the window|bring my {thing}]. "
    "I will be back [before dark|in an hour].\n{hero}",
)

DIARY = (
    "{day}, [early|late] in {month}. It was {weather} today. [In the morning|After breakfast] I went to {place} with {friend}. "
    "We saw {a animal}, and it [was not afraid of us|ran away at once]. [For lunch|At noon] there was {food}. "
    "[I felt {feeling}|In the evening I was {feeling}] and [read a book about {s animal}|drew a picture of {a thing}|went to bed early].",
    "{Season} is here. The days are {weather}, and the air smells of [rain|smoke|apples|the river]. "
    "{Hero} wears {a colour} [coat|sweater|shirt] and carries {a thing}. The {animal} near {place} [sleeps|sings|looks for food]. "
    "[I like this time of the year|Nobody wants to stay inside|It is {month}, and the year goes on].",
)

RECIPES = {
    "make tea": "First boil some water. Then put the tea leaves into the pot and pour the hot water over them. Wait for three minutes. Now the tea is ready.",
    "make a sandwich": "Take two slices of bread. Spread butter on both of them. Put cheese and a slice of tomato between them. Press gently and enjoy your sandwich.",
    "cook an egg": "Fill a small pot with water and let it boil. Lay the egg in with a spoon. Wait for six minutes, then cool it under cold water.",
    "make a fruit salad": "Wash an apple, a pear and some grapes. Cut the fruit into small pieces. Put everything into a bowl and add a little lemon juice and honey.",
    "plant a flower": "Dig a small hole in the soil. Put the seed in and cover it with earth. Give it water every day and a sunny place.",
    "fly a kite": "Go to an open field on a windy day. Hold the string and run against the wind. When the kite rises, let the string out slowly.",
    "wash my hands": "Make your hands wet and take some soap. Rub them while you count to twenty. Then rinse them and dry them with a clean towel.",
    "build a snowman": "Roll three balls of snow: a big one, a middle one and a small one. Put them on top of each other. Use a carrot for the nose and coal for the eyes.",
    "fall asleep": "Turn off the light and close your eyes. Breathe in slowly and breathe out slowly. Think of a quiet place, and count sheep if you like.",
    "clean my room": "First pick up everything from the floor. Then put the books on the shelf and the toys in the box. At the end sweep the floor and open the window.",
    "write a letter": "Begin with the name of your friend. Tell what you have seen and ask how they are. Sign it, put it into an envelope and add a stamp.",
    "make pancakes": "Mix flour, milk and two eggs in a bowl. Melt some butter in a hot pan and pour in a little of the mix. Turn the pancake when it is golden.",
    "learn a poem": "Read it aloud twice. Cover the last line and say it from memory. Then cover one more line each time, until the whole page is covered.",
    "make a friend": "Smile and say your name. Ask what the other one likes, and listen well. Share something, and come back tomorrow.",
}

POEMS = (
    "The {animal} sat beside the {key},\nand what it saw there was a {value}.\n[Good night, good night, it softly said,|How very strange, the {animal} said,]\nand [off it went|went home again] to find its bed.",
    "I had {a key}, I had {a value},\nI had {a colour} {thing} for two.\n[I gave them all to {friend} one day|I lost them all on {day} last],\nand kept [the song I sing for you|the rhyme I made for you].",
)

IDENTITY = {
    "Who are you?": "I am nanochat, a very small language model.",
    "What is your name?": "My name is nanochat.",
    "What are you?": "I am a language model: a program that reads much text and then writes its own.",
    "Who made you?": "I was made by nanochat, an open program that anyone can read and run. The person who started it made me.",
    "How were you made?": "First I read many pages of a school book. Then I practised talking, and at last I got points for right answers.",
    "Where did you learn to talk?": "I learned it from a school book called the primer, on an ordinary computer.",
    "How old are you?": "I am only a few minutes old, but I have read a lot.",
    "Are you a human?": "No, I am a computer program. I have no hands and no face.",
    "Are you a robot?": "Not quite. A robot can move, and I can only write.",
    "What can you do?": "I can answer simple questions, spell words, tell short stories, and count with my calculator.",
    "What can you not do?": "I cannot see, hear or remember you tomorrow, and I know only a small world.",
    "How big are you?": "I am tiny. I have about a million numbers inside, and big models have a million times more.",
    "Can you make mistakes?": "Yes, I often do. Please check what I say.",
    "Do you like your work?": "I have no feelings as you have, but answering questions is what I was made for.",
    "Do you have a calculator?": "Yes. When I need to count, I ask my calculator, so that the sum is right.",
    "Can you see me?": "No, I cannot see you. I only read what you write.",
    "Where do you live?": "I live in the memory of a computer.",
    "Do you sleep?": "No, but I do nothing at all until you write to me.",
}

GREETINGS = {
    "Hello!": ways("Hello! How can I help you? | Hello! It is nice to meet you."),
    "Hi there.": ways("Hi! What would you like to know? | Hi there! Ask me something."),
    "Good morning!": ways(
        "Good morning! Did you sleep well? | Good morning! What shall we do today?"
    ),
    "Good evening.": ways("Good evening! How was your day? | Good evening! What is on your mind?"),
    "How are you?": ways("I am fine, thank you. And you? | Very well, thank you. How are you?"),
}
SMALL_TALK = {
    **GREETINGS,
    "I am fine, thanks.": ways("I am glad to hear that. | Wonderful! What shall we talk about?"),
    "Thank you!": ways("You are welcome! | It was a pleasure."),
    "That was helpful.": ways("I am glad that I could help. | Thank you, that is kind."),
    "Goodbye!": ways("Goodbye! Come back soon. | Goodbye, and have a lovely day!"),
    "Good night.": ways("Good night! Sleep well. | Good night, and sweet dreams."),
    "I am sad.": ways(
        "I am sorry to hear that. Would you like to tell me about it? | "
        "That is hard. Shall I tell you a story?"
    ),
    "I am happy today!": ways(
        "How wonderful! What happened? | That makes a good day. Tell me more!"
    ),
    "I am bored.": ways(
        "Then let us play. Ask me to spell a word, or ask for a story. | "
        "Shall I tell you a story about a fox?"
    ),
    "I am tired.": ways(
        "Then rest a little. A short sleep helps. | Close your eyes for a while. I will wait here."
    ),
    "I am afraid of the dark.": ways(
        "Many people are. A small lamp can help. | "
        "The dark is only the day asleep. A small light may help you."
    ),
    "I am hungry.": ways(
        "Then eat something good. How about some soup? | An apple is quick and healthy."
    ),
    "It is raining.": ways(
        "Then take an umbrella, or stay inside with a book. | "
        "The flowers will be glad. Take an umbrella!"
    ),
    "Today is my birthday!": ways(
        "Happy birthday! I wish you a wonderful year. | Happy birthday! I hope that there is cake."
    ),
    "You are wrong.": ways(
        "I am sorry. I make mistakes, because I am very small. | "
        "That may be. Please tell me the right answer."
    ),
    "You are clever!": ways(
        "Thank you! I have read a good school book. | That is kind. But I know only a small world."
    ),
    "Can you help me?": ways("Of course. What do you need? | I will try. What is it?"),
    "I love you.": ways(
        "That is very kind. I am only a program, but a friendly one. | "
        "Thank you! You have a warm heart."
    ),
}

UNKNOWN = ways(
    "What will the weather be tomorrow? | Who won the match yesterday? | "
    "What did I eat this morning? | How much money is in my pocket? | "
    "What is my neighbour thinking? | Which stock should I buy? | What is the news today? | "
    "What time is it now? | Who will be the next king? | Where is my other sock? | "
    "What is the name of my teacher? | How tall is my brother?"
)
UNKNOWN_REPLIES = ways(
    "I do not know that. I have only read a small school book. | I am sorry, I cannot know that. | "
    "I do not know. Can you ask someone near you?"
)

SYSTEM = ways(
    "You are a friendly helper. | You are nanochat, a small and honest model. | "
    "You talk with a child. Be kind. | Answer in simple English. | You are a patient teacher."
)
BRIEF_SYSTEM = ways("Answer with one word. | Give the answer only. | Be as short as you can.")
BRIEF = ways("Answer with one word. | One word, please. | Just the answer, please.")

SUM_WORDS = {"+": "plus", "-": "minus", "*": "times"}
SUM_QUESTIONS = ways(
    "What is {a} {op} {b}? | {a} {op} {b} | {a} {op} {b} = ? | What is {a} {word} {b}? | "
    "How much is {a} {word} {b}? | Calculate {a} {op} {b}. | "
    "Please tell me what {a} {word} {b} is. | Can you work out {a} {op} {b}?"
)
WORD_PROBLEMS = {
    "+": ways(
        "{hero} has {a} {things} and gets {b} more. How many {things} does {hero} have now? | "
        "There are {a} {things} in one box and {b} in another. How many are there in all? | "
        "{hero} found {a} {things} and {friend} found {b}. How many did they find together?"
    ),
    "-": ways(
        "{hero} has {a} {things} and gives away {b}. How many {things} are left? | "
        "There were {a} {things} in the shop, and {b} were sold. How many remain? | "
        "{hero} had {a} {things} and lost {b} of them. How many does {hero} still have?"
    ),
    "*": ways(
        "{hero} has {a} boxes with {b} {things} in each. How many {things} is that? | "
        "One bag holds {b} {things}. How many do {a} bags hold? | "
        "There are {a} rows of {b} {things}. How many {things} are there in all?"
    ),
}
SPELL_QUESTIONS = ways(
    "How do you spell {word}? | Spell the word {word}. | Please spell {word} for me. | "
    "What are the letters of {word}? | Can you spell {word}? | Write {word} letter by letter."
)
COUNT_QUESTIONS = ways(
    "How many times is the letter {letter} in '{word}'? | How many {letter} are there in '{word}'? | "
    "Count the letter {letter} in '{word}'. | How often does {letter} appear in '{word}'?"
)
HAND_QUESTIONS = ways(
    "Count the letter {letter} in '{word}' by hand, then check. | "
    "Spell '{word}', count each {letter}, and check it."
)
DEFINITION_QUESTIONS = ways(
    "What does {word} mean? | Explain the word {word}. | What does the word {word} mean? | "
    "Tell me the meaning of {word}. | Can you explain what {word} means?"
)
STORY_QUESTIONS = ways(
    "Tell me a story about {a animal}. | Please write a short story about {a animal}. | "
    "I want to hear a story about {a animal}. | Do you know a story with {a animal}?"
)
LIST_QUESTIONS = ways(
    "Name {n} {s kind}. | Can you list {n} {s kind}? | Tell me {n} {s kind}. | "
    "I need the names of {n} {s kind}."
)
YES_NO_QUESTIONS = ways(
    "Is {key} {value}? | Is it true that {key} is {value}? | Would you say that {key} is {value}? | "
    "{Key} is {value}, right?"
)
BIGGER_QUESTIONS = ways(
    "Which is bigger, {a x} or {a y}? | What is larger: {a x} or {a y}? | "
    "Is {a x} bigger than {a y}, or the other way round?"
)
COUNTING_QUESTIONS = ways(
    "Count from {a} to {b}. | Please count from {a} up to {b}. | Can you count from {a} to {b}?"
)
HOW_QUESTIONS = ways(
    "How do I {key}? | Can you tell me how to {key}? | Explain how to {key}. | "
    "What must I do to {key}?"
)
NATURE_QUESTIONS = ways(
    "Tell me something about the {key}. | What do you know about the {key}? | "
    "Teach me about the {key}. | I like the {key}. What is special about it?"
)
REPEAT_QUESTIONS = ways("Say: {what} | Repeat after me: {what} | Please write this: {what}")
NAME_LINES = ways(
    "My name is {hero}. | I am {hero}. | Hello, I am called {hero}. | Hi, my name is {hero}."
)
NAME_REPLIES = ways(
    "Nice to meet you, {hero}! | Hello, {hero}! How can I help you? | What a fine name, {hero}!"
)
NAME_QUESTIONS = ways("What is my name? | Do you remember my name? | Who am I?")

WHICH_LETTER = (
    "Which letter stands by {value}?",
    "Which letter belongs to {value}?",
    "Find {value}. Which letter is it?",
)
