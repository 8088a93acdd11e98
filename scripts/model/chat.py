"""Questions with one right answer, short dialogues, small talk.

Each task draws `(question, answer)` from a `random.Random`; the answer is a function of the question
alone, so that it can be checked letter by letter. Does not know about tokens or templates of turns.

Invariant (what "held out" means): `held_out(text)` picks about a tenth of all question texts by hash.
A single question whose exact text is held out is never put into training, neither alone nor inside
a conversation; a dialogue is held out by the text of all its user turns together, but the same
turns may be part of a longer dialogue of the training.
"""

import hashlib

import stories
import words as w


def held_out(text):
    """Whether this exact question text is kept for the test; the README's own question always is."""
    return text == "What is 7 plus 5?" or hashlib.sha256(text.encode()).digest()[0] < 26


def an(word):
    """`a cow`, `an owl`."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def cap(text):
    """Upper-cases the first letter only."""
    return text[0].upper() + text[1:]


IRREGULAR = {"mouse": "mice", "sheep": "sheep", "goose": "geese", "wolf": "wolves", "donkey": "donkeys", "fox": "foxes",
             "turkey": "turkeys", "monkey": "monkeys", "goldfish": "goldfish", "canary": "canaries", "puppy": "puppies",
             "deer": "deer"}


def plural(word):
    """`cows`, `mice`."""
    return IRREGULAR.get(word) or (word[:-1] + "ies" if word.endswith("y") else word + "s")


# One question form and the answer form that belongs to it.
SUMS = [
    ("What is {a} plus {b}?", "{a} plus {b} is {c}."), ("What is {a} + {b}?", "{a} + {b} = {c}."),
    ("How much is {a} plus {b}?", "{a} plus {b} is {c}."), ("Add {a} and {b}.", "{a} plus {b} is {c}."),
    ("What is the sum of {a} and {b}?", "The sum of {a} and {b} is {c}."), ("{a} + {b} = ?", "{a} + {b} = {c}."),
    ("Can you add {a} and {b}?", "Yes. {a} plus {b} is {c}."), ("How much is {a} + {b}?", "{a} + {b} = {c}."),
    ("Please tell me what {a} plus {b} is.", "{a} plus {b} is {c}."), ("{a} plus {b}?", "{a} plus {b} is {c}."),
    ("What's {a} plus {b}?", "{a} plus {b} is {c}."), ("what is {a} plus {b}", "{a} plus {b} is {c}."),
    ("What do you get when you add {a} and {b}?", "{a} plus {b} is {c}."), ("{a}+{b}", "{a} + {b} = {c}."),
]
WORD_SUMS = [
    ("{N} has {a} {t} and gets {b} more. How many {t} does {he} have now?", "{He} has {c} {t} now."),
    ("{N} has {a} {t}. {M} gives {him} {b} more. How many {t} does {N} have?", "{N} has {c} {t}."),
    ("There are {a} {t} in a box and {b} {t} in a bag. How many {t} are there?", "There are {c} {t}."),
]
THINGS = ["apple", "book", "coin", "cookie", "egg", "flower", "nut", "pear", "pencil", "shell", "stone", "toy"]


def sums(rng):
    """A sum with a result of at most 20."""
    total = rng.randint(0, 20)
    a = rng.randint(0, total)
    b = total - a
    if rng.random() < 0.85:
        question, answer = rng.choice(SUMS)
        return question.format(a=a, b=b), answer.format(a=a, b=b, c=total)
    # From two on, so that the things can always be named in the plural.
    a = rng.randint(2, 18)
    b = rng.randint(2, 20 - a)
    question, answer = rng.choice(WORD_SUMS)
    boy = rng.random() < 0.5
    thing = plural(rng.choice(THINGS))
    slots = {"a": a, "b": b, "c": a + b, "t": thing, "N": rng.choice(w.BOYS if boy else w.GIRLS),
             "M": rng.choice(["Grandma", "A friend", "The teacher", "Mother"]), "he": "he" if boy else "she",
             "He": "He" if boy else "She", "him": "him" if boy else "her"}
    return question.format(**slots), answer.format(**slots)


OPPOSITE = {}
for left, right in w.OPPOSITES:
    OPPOSITE.setdefault(left, right)
for left, right in w.OPPOSITES:
    OPPOSITE.setdefault(right, left)
OPPOSITE_FORMS = [
    ("What is the opposite of {w}?", ""), ("Tell me the opposite of {w}.", ""), ("Name the opposite of {w}.", ""),
    ("What is the opposite of the word {w}?", ""), ("Can you name the opposite of {w}?", "Yes. "), ("Opposite of {w}?", ""),
    ("Which word is the opposite of {w}?", ""), ("Give me the opposite of {w}.", ""), ("what is the opposite of {w}", ""),
    ("Do you know the opposite of {w}?", "Yes. "), ("Please give the opposite of {w}.", ""),
]


def opposites(rng):
    """The opposite of a common word."""
    word = rng.choice(list(OPPOSITE))
    form, lead = rng.choice(OPPOSITE_FORMS)
    return form.format(w=word), f"{lead}The opposite of {word} is {OPPOSITE[word]}."


SOUND_FORMS = ["What sound does {a} make?", "What does {a} say?", "What noise does {a} make?", "Which sound does {a} make?",
               "Tell me what {a} says.", "How does {a} sound?", "what sound does {a} make", "Do you know what {a} says?"]


def sounds(rng):
    """The sound of an animal, or the animal of a sound."""
    animal = rng.choice(list(w.ANIMAL_SOUNDS))
    sound = w.ANIMAL_SOUNDS[animal]
    pick = rng.random()
    if pick < 0.12:
        return f"Which animal says {sound}?", f"{cap(an(animal))} says {sound}."
    if pick < 0.26:
        form = rng.choice(["What do {p} say?", "What sound do {p} make?", "What noise do {p} make?"])
        return form.format(p=plural(animal)), f"{cap(plural(animal))} say {sound}."
    return rng.choice(SOUND_FORMS).format(a=an(animal)), f"{cap(an(animal))} says {sound}."


COLOUR_FORMS = ["What color is {a}?", "What colour is {a}?", "What is the color of {a}?", "Which color does {a} have?",
                "Tell me the color of {a}.", "Which colour is {a}?", "what color is {a}", "Do you know the color of {a}?"]


def colours(rng):
    """The usual colour of an animal."""
    animal = rng.choice(list(w.ANIMAL_COLOURS))
    colour = w.ANIMAL_COLOURS[animal]
    if rng.random() < 0.2:
        form = rng.choice(["What color are {p}?", "What colour are {p}?", "What is the color of {p}?"])
        return form.format(p=plural(animal)), f"{cap(plural(animal))} are {colour}."
    return rng.choice(COLOUR_FORMS).format(a=an(animal)), f"{cap(an(animal))} is {colour}."


REPEAT_FORMS = ["Repeat after me: {l}.", "Please repeat: {l}.", "Repeat these words: {l}.", "Say this back to me: {l}.",
                "Repeat this list: {l}.", "Say: {l}.", "Can you repeat this list? {l}.", "Copy this list: {l}.",
                "Repeat: {l}", "Please say these words: {l}."]
NUMBER_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
REPEAT_POOL = w.LIST_WORDS + w.COLOURS + NUMBER_WORDS + w.GIRLS + w.BOYS


def repeat(rng):
    """A list of two to five words or numbers, said back."""
    count = rng.choice([2, 3, 3, 4, 4, 5])
    if rng.random() < 0.25:
        items = [str(rng.randint(0, 99)) for _ in range(count)]
    else:
        items = [rng.choice(w.TOPICS if rng.random() < 0.1 else REPEAT_POOL) for _ in range(count)]
    text = ", ".join(items)
    return rng.choice(REPEAT_FORMS).format(l=text), text + "."


SORT_NUMBERS = ["Sort these numbers: {l}.", "Sort these numbers from smallest to largest: {l}.", "Put these numbers in order: {l}.",
                "Order these numbers: {l}.", "Arrange these numbers from smallest to largest: {l}.", "Please sort: {l}.",
                "Can you sort these numbers? {l}."]
SORT_DOWN = ["Sort these numbers from largest to smallest: {l}.", "Put these numbers in order from largest to smallest: {l}."]
SORT_WORDS = ["Sort these words: {l}.", "Put these words in alphabetical order: {l}.", "Sort these words alphabetically: {l}.",
              "Sort these words from A to Z: {l}.", "Please sort these words: {l}.", "Can you sort these words? {l}."]


def sort_numbers(rng):
    """Three to five different numbers up to 20 in order."""
    items = rng.sample(range(21), rng.choice([3, 3, 4, 4, 5]))
    down = rng.random() < 0.2
    question = rng.choice(SORT_DOWN if down else SORT_NUMBERS).format(l=", ".join(map(str, items)))
    return question, ", ".join(map(str, sorted(items, reverse=down))) + "."


def sort_words(rng):
    """Three or four of 64 known words in alphabetical order."""
    items = rng.sample(w.SORT_WORDS, rng.choice([3, 3, 4]))
    return rng.choice(SORT_WORDS).format(l=", ".join(items)), ", ".join(sorted(items)) + "."


AFTER = ["What {k} comes after {d}?", "Which {k} comes after {d}?", "What comes after {d}?", "What is the {k} after {d}?",
         "Which {k} follows {d}?", "Tell me the {k} after {d}.", "Which {k} is next after {d}?", "what {k} comes after {d}"]
BEFORE = ["What {k} comes before {d}?", "Which {k} comes before {d}?", "What comes before {d}?", "What is the {k} before {d}?",
          "Tell me the {k} before {d}.", "Which {k} is right before {d}?", "what {k} comes before {d}"]


def neighbour(rng, kind, names):
    """The day or month before or after another."""
    index = rng.randrange(len(names))
    if rng.random() < 0.5:
        return (rng.choice(AFTER).format(k=kind, d=names[index]), f"{names[(index + 1) % len(names)]} comes after {names[index]}.")
    return rng.choice(BEFORE).format(k=kind, d=names[index]), f"{names[index - 1]} comes before {names[index]}."


def days(rng):
    """Neighbours of a day; tomorrow and yesterday."""
    if rng.random() < 0.7:
        return neighbour(rng, "day", w.DAYS)
    index = rng.randrange(7)
    form = rng.choice(["Today is {d}. What day {t}?", "If today is {d}, what day {t}?", "It is {d} today. What day {t}?"])
    if rng.random() < 0.5:
        return form.format(d=w.DAYS[index], t="is tomorrow"), f"Tomorrow is {w.DAYS[(index + 1) % 7]}."
    return form.format(d=w.DAYS[index], t="was yesterday"), f"Yesterday was {w.DAYS[index - 1]}."


ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


def months(rng):
    """Neighbours of a month; the month with a number."""
    if rng.random() < 0.8:
        return neighbour(rng, "month", w.MONTHS)
    index = rng.randrange(12)
    form = rng.choice(["What is the {o} month of the year?", "Which month is the {o}?", "Name the {o} month of the year.",
                       "Which month is number {n}?"])
    return form.format(o=ORDINALS[index], n=index + 1), f"{w.MONTHS[index]} is the {ORDINALS[index]} month of the year."


def single(rng, task=None, want_held_out=False, late=False):
    """One question of a task (or of any), on the asked side of the held-out line."""
    task = task or rng.choices(list(TASKS), [weights[late] for _, weights in TASKS.values()])[0]
    while True:
        question, answer = TASKS[task][0](rng)
        if held_out(question) == want_held_out:
            return question, answer


# ---- dialogues: lists of (user turn, answer) -------------------------------------------------

def told_name(rng):
    name = rng.choice(w.GIRLS + w.BOYS)
    tell, reply = rng.choice([("My name is {n}.", "Nice to meet you, {n}!"), ("Hello! I am {n}.", "Hello, {n}! How can I help you?"),
                              ("Hi, my name is {n}.", "Hi, {n}! Nice to meet you."), ("I am {n}.", "Nice to meet you, {n}!"),
                              ("Hello, my name is {n}.", "Hello, {n}! Nice to meet you.")])
    ask = rng.choice(["What is my name?", "Do you remember my name?", "Who am I?", "What was my name?", "Tell me my name."])
    return (tell.format(n=name), reply.format(n=name)), (ask, f"Your name is {name}.")


def told_colour(rng):
    colour = rng.choice(w.COLOURS)
    tell = rng.choice(["My favorite color is {c}.", "I like the color {c} best.", "I love the color {c}."]).format(c=colour)
    ask = rng.choice(["What is my favorite color?", "Which color do I like best?", "Do you remember my favorite color?"])
    return (tell, f"{cap(colour)} is a lovely color."), (ask, f"Your favorite color is {colour}.")


def told_pet(rng):
    kind, name = rng.choice(["dog", "cat", "rabbit", "horse", "bird", "hamster", "goat"]), rng.choice(w.PETS)
    tell = rng.choice(["I have a {k} named {n}.", "I have a {k} called {n}.", "My {k} is called {n}."]).format(k=kind, n=name)
    ask = rng.choice(["What is my {k} called?", "What is the name of my {k}?", "Do you remember the name of my {k}?"]).format(k=kind)
    return (tell, f"{name} is a nice name for a {kind}."), (ask, f"Your {kind} is called {name}.")


def told_age(rng):
    age = rng.randint(3, 20)
    ask = rng.choice(["How old am I?", "What is my age?", "Do you remember how old I am?"])
    return (f"I am {age} years old.", f"You are {age} years old. That is a good age."), (ask, f"You are {age} years old.")


def told_food(rng):
    food = rng.choice(w.SWEETS)
    tell = rng.choice(["I like {f}.", "I love {f}.", "I like to eat {f}."]).format(f=food)
    ask = rng.choice(["What do I like?", "What do I like to eat?", "Do you remember what I like?"])
    return (tell, f"Many people like {food}."), (ask, f"You like {food}.")


TOLD = [told_name, told_name, told_colour, told_pet, told_age, told_food]


def remembered(rng):
    """Something told, perhaps a question or a second fact in between, then asked back."""
    first, second = rng.sample(TOLD[1:], 2)
    (tell, ask), (tell2, ask2) = first(rng), second(rng)
    pick = rng.random()
    if pick < 0.35:
        return [tell, ask]
    if pick < 0.65:
        return [tell, single(rng), ask]
    if pick < 0.85:
        return [tell, tell2, rng.choice([ask, ask2])]
    return [tell, tell2, ask2, ask]


def follow_sum(rng):
    question, answer, total = "", "", 21
    while total > 18 or held_out(question):
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        total = a + b
        question, answer = f"What is {a} plus {b}?", f"{a} plus {b} is {total}."
    more = rng.randint(1, 20 - total)
    return [(question, answer), (rng.choice(["And plus {m}?", "Now add {m}.", "Plus {m} more?"]).format(m=more),
                                 f"{total} plus {more} is {total + more}.")]


def follow_day(rng):
    kind, names = rng.choice([("day", w.DAYS), ("month", w.MONTHS)])
    index, turns = rng.randrange(len(names)), []
    question = f"What {kind} comes after {names[index]}?"
    for step in range(rng.choice([2, 2, 3])):
        here, there = names[(index + step) % len(names)], names[(index + step + 1) % len(names)]
        turns.append((question, f"{there} comes after {here}."))
        question = rng.choice(["And after that?", "And then?", "What comes next?"])
    return turns


def follow_animal(rng):
    facts, form, verb = rng.choice([(w.ANIMAL_SOUNDS, "What does {a} say?", "says"), (w.ANIMAL_COLOURS, "What color is {a}?", "is")])
    turns = []
    for animal in rng.sample(list(facts), rng.choice([2, 2, 3])):
        turns.append((form.format(a=an(animal)), f"{cap(an(animal))} {verb} {facts[animal]}."))
        form = rng.choice(["And {a}?", "What about {a}?", "And what about {a}?"])
    return turns


def follow_opposite(rng):
    first, second = rng.sample(list(OPPOSITE), 2)
    return [(f"What is the opposite of {first}?", f"The opposite of {first} is {OPPOSITE[first]}."),
            (rng.choice(["And of {w}?", "And the opposite of {w}?", "What about {w}?"]).format(w=second),
             f"The opposite of {second} is {OPPOSITE[second]}.")]


def follow_list(rng):
    if rng.random() < 0.5:
        question, answer = single(rng, "repeat")
        return [(question, answer), (rng.choice(["Once more, please.", "Say it again.", "Again, please."]), answer)]
    items = rng.sample(range(21), rng.choice([3, 4]))
    question = rng.choice(SORT_NUMBERS[:4]).format(l=", ".join(map(str, items)))
    return [(question, ", ".join(map(str, sorted(items))) + "."),
            (rng.choice(["And from largest to smallest?", "Now from largest to smallest."]),
             ", ".join(map(str, sorted(items, reverse=True))) + ".")]


FOLLOW = [follow_sum, follow_day, follow_animal, follow_opposite, follow_list]


def dialogue(rng, want_held_out=False):
    """A short exchange whose last answer needs an earlier turn; see the header for "held out"."""
    while True:
        turns = remembered(rng) if rng.random() < 0.55 else rng.choice(FOLLOW)(rng)
        # The first turns of follow-ups are ordinary single questions: keep the held-out ones away.
        if any(held_out(question) for question, _ in turns[:-1] if question.endswith("?") or ":" in question):
            continue
        if held_out("\n".join(question for question, _ in turns)) == want_held_out:
            return turns


# ---- small talk and story requests (not part of the test) -------------------------------------

WHO = "I am a small language model. I can tell stories and answer simple questions."
SMALL_TALK = [
    ("Hello|Hello!|Hi|Hi!|Hi there!|Hey|Good day!", "Hello! How can I help you?"), ("Good morning!|Good morning", "Good morning! How can I help you?"),
    ("Good evening!", "Good evening! How can I help you?"), ("Good night!|Good night", "Good night! Sleep well."),
    ("Who are you?|What are you?|What is your name?|Are you a robot?|Tell me about yourself.|Are you a human?|Who am I talking to?", WHO),
    ("How are you?|How are you today?|How do you do?", "I am fine, thank you. How are you?"),
    ("What can you do?|How can you help me?|Can you help me?|Help|What do you know?",
     "I can tell a short story, add small numbers, sort a list, and talk about animals, days and months."),
    ("Thank you!|Thanks!|Thank you very much.|Thanks|Thank you", "You are welcome!"), ("Goodbye!|Bye!|See you!|Goodbye", "Goodbye! Have a nice day."),
    ("How many days are in a week?|How many days does a week have?", "There are seven days in a week."),
    ("How many months are in a year?|How many months does a year have?", "There are twelve months in a year."),
    ("Name the days of the week.|What are the days of the week?", "The days of the week are " + ", ".join(w.DAYS[:6]) + " and Sunday."),
    ("Name the months of the year.|What are the months of the year?", "The months of the year are " + ", ".join(w.MONTHS[:11]) + " and December."),
    ("I am sad.|I feel sad.|I feel sad today.", "I am sorry to hear that. Shall I tell you a story?"),
    ("I am happy.|I feel happy today.|I feel great!", "That is good to hear!"), ("Yes|Yes, please.|Ok|Okay", "Good! What would you like to know?"),
    ("No|No, thank you.", "All right. Tell me if you need something."),
]
UNKNOWN_PLACE = ["What is the capital of {x}?", "Who is the king of {x}?", "Where is {x}?", "How far is it to {x}?", "What is the weather in {x}?",
                 "How many people live in {x}?", "Who was the first person in {x}?", "What is the history of {x}?"]
UNKNOWN_TOPIC = ["What is {x}?", "Tell me about {x}.", "Write a poem about {x}.", "How does {x} work?", "Explain {x}.", "What do you know about {x}?",
                 "Write a program about {x}.", "Why is {x} important?", "What does {x} mean?", "Who invented {x}?", "Can you explain {x} to me?"]
COUNTRIES = """France Spain Italy Germany China Japan India Brazil Canada Egypt Kenya Norway London Paris Rome Berlin Europe Africa Asia
America Mexico Russia Turkey Greece Poland Sweden Australia""".split()
STORY_FORMS = ["Tell me a story about {s}.", "Write a short story about {s}.", "Can you tell me a story about {s}?", "I want to hear a story about {s}.",
               "Please tell me a story about {s}.", "Write a story about {s}.", "Tell me a short story about {s}.", "A story about {s}, please."]
PLAIN_FORMS = ["Tell me a story.", "Tell me a short story.", "Can you tell me a story?", "Please tell me a story.", "Write a story."]


def small_talk(rng):
    """A greeting, a question about the model, or one that it cannot answer."""
    pick = rng.random()
    if pick < 0.45:
        forms, things = (UNKNOWN_PLACE, COUNTRIES) if pick < 0.1 else (UNKNOWN_TOPIC, w.TOPICS)
        return rng.choice(forms).format(x=rng.choice(things)), "I do not know that. I am only a small model."
    asked, answer = rng.choice(SMALL_TALK)
    return rng.choice(asked.split("|")), answer


def story_request(rng):
    """A request for a story and the story; one in ten names no subject."""
    subject, text = stories.story(rng)
    form = rng.choice(PLAIN_FORMS if rng.random() < 0.1 else STORY_FORMS)
    return form.format(s=subject), text


# Each task with how often it is drawn, first early and then late in the training: what is hard gains.
TASKS = {"sums": (sums, (18, 20)), "opposites": (opposites, (8, 6)), "sounds": (sounds, (7, 5)), "colours": (colours, (8, 4)),
         "repeat": (repeat, (15, 14)), "sort numbers": (sort_numbers, (15, 24)), "sort words": (sort_words, (15, 20)),
         "days": (days, (6, 4)), "months": (months, (8, 6))}

SYSTEM = ["You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.", "You are a kind teacher.",
          "You are a helpful assistant. Answer in one sentence.", "You tell stories and answer simple questions.", "Be polite.",
          "You are a small model that helps children."]
