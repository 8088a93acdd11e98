"""Short scenes: paragraphs and dialogues with more words and sentence forms than the story plots have.

A scene follows one person through a few everyday sentences. It widens the vocabulary and
loosens the plots, so that the model learns sentences and not only twenty stories.
Uses the template language of `stories.py`. Invariant: the same `random.Random` state gives the same scene.
"""

import stories
import words as w

JOBS = [
    ("baker", "bakes bread before the sun comes up", "bakery", "flour"), ("farmer", "feeds the cows and the chickens", "farm", "hay"),
    ("teacher", "teaches the children how to read", "school", "chalk"), ("doctor", "takes care of sick people", "hospital", "medicine"),
    ("sailor", "sails across the wide ocean", "harbor", "rope"), ("painter", "paints pictures of mountains and clouds", "studio", "brushes"),
    ("gardener", "waters the plants every morning", "garden", "seeds"), ("driver", "drives a yellow bus through the city", "bus station", "keys"),
    ("cook", "makes dinner for many guests", "kitchen", "spices"), ("carpenter", "builds tables and chairs", "workshop", "nails"),
    ("fisherman", "catches fish in his net", "harbor", "nets"), ("tailor", "sews coats and dresses", "shop", "thread"),
    ("postman", "brings letters to every house", "post office", "stamps"), ("musician", "plays the violin in the evening", "concert hall", "music"),
    ("nurse", "helps the doctor", "hospital", "bandages"), ("shepherd", "watches the sheep on the hill", "field", "wool"),
    ("pilot", "flies a plane above the clouds", "airport", "maps"), ("librarian", "puts the books back on the shelves", "library", "paper"),
    ("clown", "makes everybody laugh", "circus", "balloons"), ("firefighter", "puts out fires", "fire station", "hoses"),
]
WEATHER = ["The sky was [blue|gray|clear|cloudy|dark].", "The sun was [shining|hot|low|warm|just coming up].", "[Rain|Snow] was falling softly.",
           "A [cold|cool|warm|strong|gentle] wind blew [from the sea|through the trees|over the hills|down the street].", "The air smelled of [flowers|rain|fresh bread|smoke|grass].",
           "It was [cold|warm|hot|foggy|windy|rainy|sunny] outside.", "The [moon|stars] [shone|sparkled] [above the roofs|over the village|in the night sky].",
           "Thunder rolled [far away|over the valley].", "The leaves were [red and gold|wet|falling from the trees].", "There was [ice|frost|fog|snow] [on the windows|on the road|over the fields]."]
WAKE = ["{X} woke up [early|late|at six|at seven|before everyone else].", "{X} got out of bed and [stretched|yawned|washed {his} face|brushed {his} teeth|combed {his} hair].",
        "{X} put on {his} [{colour}|warm|clean|favorite] [shirt|coat|jacket|boots|socks|sweater|shoes].", "For breakfast, {X} had {food} and {food2}.",
        "{X} [helped {his} {parent}|made {his} bed|fed the {petanimal}|opened the curtains|packed {his} bag]."]
DO = ["{X} [walked|ran|hurried|strolled] to {place}.", "{X} [climbed over|jumped over|sat on|painted] the [fence|wall|wooden gate].",
      "{X} [washed the dishes|swept the floor|folded the clothes|cleaned the windows|set the table|cooked some rice|carried the basket|chopped some wood].",
      "{X} [drew a picture of|read a book about|dreamed about|told a joke about|sang a song about] [a {kind2}|a castle|a dragon|a princess|a pirate|a rocket|the ocean|a giant|a wizard|a treasure].",
      "{X} [counted|collected|found|picked] [three|four|five|seven|ten|twelve|twenty] [shells|leaves|stones|feathers|buttons|coins|flowers|acorns|apples|mushrooms].",
      "{X} [bought|sold|borrowed|dropped|carried|fixed|cleaned|hid] {a_thing}.", "{X} [wrote a letter to|called|visited|waited for|waved to|thanked] {his} {parent2}.",
      "{X} saw {sight1} and {sight2}.", "{X} played [hide and seek|chess|cards|football|a game|the drums|the piano|the flute] with {fX}.",
      "{X} [built|made] a [tower|castle|nest|bridge|house|boat|tent] out of [blocks|sand|sticks|stones|mud|blankets|boxes].",
      "{X} [looked for|followed|chased|watched|listened to] a [butterfly|{kind2}|bee|train|squirrel|snail|dragonfly].",
      "Near {place}, {X} met the {job}, who {jobdoes}.", "{X} learned a new [word|song|trick|game|dance] from {fX}."]
FEEL = ["{X} was [tired|hungry|thirsty|bored|excited|surprised|proud|nervous|angry|lonely|glad|sleepy|worried|calm].",
        "{X} felt [cold|warm|happy|a little sad|very proud|strange|safe|better].", "That made {him} [smile|laugh|cry|think|blush|shiver|angry|very happy].",
        "{X} wanted to [rest|go home|eat|play|see more|hide|know everything|sing|dance|shout for joy]."]
SPEAK = ["\"[What a|Such a] [lovely|beautiful|strange|noisy|quiet|cold|perfect] [day|morning|place|sound]!\" said {X}.", "\"[Would you like|Do you want] {food}?\" asked {fX}. \"[Yes, please|No, thank you|I would love some],\" said {X}.",
         "\"Where are you going?\" asked {fX}. \"[To {place}|Home|Nowhere|To visit my {parent2}],\" [answered|replied|said] {X}.", "\"[Be careful|Hurry up|Wait for me|Come here|Look at this|Follow me]!\" [shouted|called|whispered|cried] {fX}.",
         "\"Can you help me with {a_thing}?\" asked {fX}. \"[Of course|Sure|In a minute|Gladly],\" said {X}.", "\"I have [two|three|four|six] {kind2s},\" said {fX}. \"[I have none|I wish I had one|They are cute|How wonderful],\" said {X}.",
         "\"What do you want to be when you grow up?\" asked {fX}. \"I want to be a {job},\" said {X}.", "\"Did you know that {fact}?\" asked {fX}. \"[No, I did not|Yes, I did|Really|I never thought about that],\" said {X}."]
FACTS = ["[bees make honey|cows eat grass|owls sleep during the day|frogs begin as tadpoles|spiders have eight legs|penguins cannot fly|whales are very big]",
         "[ice is frozen water|the moon goes around the earth|plants need light|bread is made from flour|wool comes from sheep|paper is made from wood|milk comes from cows]",
         "[there are seven days in a week|there are twelve months in a year|rainbows need rain and sun|rivers flow to the sea|mountains can have snow in summer|leaves fall in autumn]"]
BECAUSE = ["{X} could not [sleep|find {his} [shoes|keys|hat]|open the [door|box|window]|reach the shelf], so {he} [asked {fX}|called {his} {parent}|tried again|gave up|waited].",
           "Because it was [late|cold|raining|{his} birthday|Sunday|a holiday], {X} [stayed at home|ate cake|wore a coat|went to bed|invited {fX}|lit a candle].",
           "When the [bell rang|clock struck nine|door opened|rain stopped|music began|lights went out], {X} [jumped|ran outside|stood up|held {his} breath|laughed|looked around].",
           "If it [rains|snows|is sunny] tomorrow, {X} will [read|go to {place}|play with {fX}|stay inside|bake bread|wear {his} boots].",
           "Before {X} [went to bed|ate dinner|left the house], {he} [closed the window|washed {his} hands|said goodbye|turned off the light|looked at the sky].",
           "After [lunch|dinner|breakfast|school|the storm], {X} and {fX} [rested in the shade|cleaned up|told stories|shared {food}|went for a walk|fed the {petanimal}]."]
NIGHT = ["[In the evening|At night|When it grew dark], {X} [sat by the fire|looked at the stars|went to bed|listened to a story|hugged {his} {parent}|blew out the candle].",
         "Soon {X} was fast asleep.", "\"Good night,\" said {his} {parent}. \"[Sleep well|Sweet dreams|See you in the morning].\"", "{X} dreamed of [flying|the sea|a golden city|a friendly giant|{place}]."]
TOWN = ["The {job} works at the {jobplace}. Every day {jobhe} {jobdoes}. {JobHe} needs a lot of {jobneeds}. [Everyone in town likes the {job}|It is hard work, but the {job} likes it|One day {X} came to help|The {job} has worked there for {years} years].",
        "A {kind2} is an animal. [It can be big or small|It is very {mood}|Many children like it]. {X} saw one {at}. [It looked at {him} and ran away|It was sleeping in the sun|It was looking for food|It made a funny noise].",
        "{X} has {a_thing}, {food} and {food2}. {fX} has only {a_thing2}. {X} gives {fhim} {food}. Now {fX} is happy."]


def scene(rng):
    """One paragraph of three to eight sentences about one person's day."""
    env = stories.new_env(rng)
    stories.finish_env(rng, env)
    job, does, jobplace, needs = rng.choice(JOBS)
    female = rng.random() < 0.5 and "his" not in does.split()
    env.update(job=job, jobdoes=does, jobplace=jobplace, jobneeds=needs, jobhe="she" if female else "he", JobHe="She" if female else "He",
               years=rng.choice(["ten", "twenty", "thirty", "forty", "fifteen"]), fact=rng.choice(FACTS), kind2=rng.choice(list(w.ANIMAL_COLOURS)),
               kind2s=rng.choice(["cats", "dogs", "rabbits", "hens", "sheep", "hamsters", "goats", "horses"]), petanimal=rng.choice(["cat", "dog", "hens", "goats", "fish", "rabbits"]),
               parent2=rng.choice(["grandmother", "grandfather", "aunt", "uncle", "cousin", "teacher", "neighbor"]),
               a_thing2=f"a {rng.choice(w.LOOKS)} {env['toy2']}")
    if rng.random() < 0.2:
        return stories.expand(rng, rng.choice(TOWN), env)
    groups = [WAKE, WEATHER, DO, DO, FEEL, SPEAK, BECAUSE, NIGHT]
    parts, seen_hero = [], False
    for group in groups:
        if group in (DO, SPEAK, BECAUSE) or rng.random() < 0.5:
            sentence = rng.choice(group)
            # After the first naming, half of the sentences that open with the name use the pronoun.
            if seen_hero and sentence.startswith("{X} ") and rng.random() < 0.5 and "{fX}" not in parts[-1]:
                sentence = "{He} " + sentence[4:]
            seen_hero = seen_hero or "{X}" in sentence
            parts.append(sentence)
    return stories.expand(rng, " ".join(parts), env)


if __name__ == "__main__":
    import random
    import sys
    generator = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for _ in range(12):
        print(scene(generator), end="\n\n")
