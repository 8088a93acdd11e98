"""Short stories from a grammar: who, where, a wish, a problem, a way out, an ending.

A template is text in which `[a|b]` picks one branch and `{name}` fills a slot; branches nest. Every
story keeps one hero, whose pronouns are slots, so that names and pronouns agree throughout.
Does not know about questions or tokens. Invariant: the same `random.Random` state gives the same story.
"""

import re

import words as w

INNER = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")


def expand(rng, text, env):
    """Fills slots and picks branches until none is left, innermost branches first."""
    while True:
        text, slots = SLOT.subn(lambda m: env[m.group(1)], text)
        text, picks = INNER.subn(lambda m: rng.choice(m.group(1).split("|")), text)
        if slots + picks == 0:
            return tidy(text)


def tidy(text):
    """Repairs what templates cannot know: spaces, `an` before a vowel, capitals at sentence starts."""
    text = re.sub(r"[ \t]+", " ", text).replace(" .", ".").replace(" ,", ",").strip()
    text = re.sub(r"\b([Aa]) (?=[aeiou])(?!one |use|uni)", r"\1n ", text)
    text = re.sub(r"(^|\n|[.!?] |[.,]\" (?=[A-Z])|\.\" )([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)
    return text


PRONOUNS = {"f": ("she", "her", "her", "herself", "girl", "daughter", "sister"),
            "m": ("he", "him", "his", "himself", "boy", "son", "brother")}


def person(env, prefix, name, sex):
    """Adds one character's slots under a prefix: the hero has none, the friend has `f`."""
    he, him, his, himself, kid, child, sibling = PRONOUNS[sex]
    slots = {"X": name, "he": he, "him": him, "his": his, "himself": himself, "kid": kid, "child": child,
             "sibling": sibling, "He": he.capitalize(), "His": his.capitalize()}
    env.update({prefix + key: value for key, value in slots.items()})


def new_env(rng):
    """Draws a hero, a friend, a helper, a place and things; returns the slots and the story's subjects."""
    env = {}
    sex, friend_sex = rng.choice("fm"), rng.choice("fm")
    names = {"f": w.GIRLS, "m": w.BOYS}
    animal = rng.random() < 0.36
    if animal:
        kind, home = rng.choice(w.HEROES)
        fkind = rng.choice([k for k, _ in w.HEROES if k != kind])
        name, fname = rng.sample(w.PETS, 2)
        env.update(kind=kind, home=home, fkind=fkind, who=f"[little |young |small |]{kind}", fwho=fkind)
        env["intro_a"] = f"a [little|young|small|{{mood}}] {kind} [named|called] {name}"
        env["subject"] = kind
        env["old_helper"] = rng.choice(["the wise old owl", "an old turtle", "the old bear", "an old goat"])
    else:
        name = rng.choice(names[sex])
        fname = rng.choice([n for n in names[friend_sex] if n != name])
        kid = PRONOUNS[sex][4]
        env.update(kind=kid, home=rng.choice(["in a small house by the sea", "in a little village", "near the forest", "in a big town",
                                              "in a yellow house", "on a quiet street", "next to a wide field", "at the foot of a hill"]))
        env.update(fkind=PRONOUNS[friend_sex][4], who=f"[little |]{kid}", fwho=PRONOUNS[friend_sex][4])
        env["intro_a"] = f"a [little|young|small|{{mood}}] {kid} [named|called] {name}"
        env["subject"] = f"{kid} named {name}"
        env["old_helper"] = rng.choice(["an old man", "an old woman", "the baker", "the teacher", "the farmer", "a kind neighbor"])
    person(env, "", name, sex)
    person(env, "f", fname, friend_sex)
    env["parent"] = rng.choice(["mother", "father"] if rng.random() < 0.7 else ["grandmother", "grandfather", "aunt", "uncle"])
    env["pa"] = "she" if env["parent"] in ("mother", "grandmother", "aunt") else "he"
    env["Pa"] = env["pa"].capitalize()
    env["pahis"] = "her" if env["pa"] == "she" else "his"
    at, place, sights, spots = rng.choice(w.PLACES)
    env.update(at=at, place=place)
    env["sight1"], env["sight2"], env["sight3"] = rng.sample(sights, 3)
    env["spot1"], env["spot2"], env["spot3"] = rng.sample(spots, 3)
    env["mood"], env["mood2"] = rng.sample(w.KIND, 2)
    env["toy"], env["toy2"] = rng.sample(w.TOYS, 2)
    env["colour"], env["colour2"] = rng.sample(w.COLOURS, 2)
    env["look"] = rng.choice(w.LOOKS)
    env["food"], env["food2"] = rng.sample(w.FOODS, 2)
    env["sweets"] = rng.choice(w.SWEETS)
    env["pet"] = rng.choice(["kitten", "puppy", "bird", "duckling", "rabbit", "lamb", "mouse", "squirrel"])
    env["night1"], env["night2"] = rng.sample(w.SOUNDS_NIGHT, 2)
    return env


OPEN = ["[Once upon a time|Once|Long ago], there was {intro_a}. {He} lived {home}. ",
        "[Once upon a time|Long ago], {intro_a} lived {home}. ",
        "There once was {intro_a} who lived {home}. ",
        "{X} was a {mood} {who} who lived {home}. ",
        "{X} was a {mood} and {mood2} {who}. [{He} lived {home}. |]",]
DAY = "[One day|One morning|One sunny day|One afternoon|One [spring|summer|autumn] day|On a [warm|windy|bright] morning]"
FELT_SAD = "[{X} felt very sad|{X} was sad|{X} began to cry|Tears came to {his} eyes|{X} did not know what to do|{His} heart felt heavy]. "
HAPPY = "[{X} was so happy|{X} smiled|{X} laughed with joy|{X} jumped up and down|{X} had a big smile on {his} face]. "
END = ["[From that day on|After that], {X} and {fX} were [best friends|good friends|always together]. ",
       "It was [a wonderful|a really good|a lovely|a very good] day. ",
       "[That night|That evening], {X} [fell asleep with a smile|slept very well|told {his} {parent} all about it]. ",
       "{X} never forgot that day. ", "And they all lived happily ever after. ", "Everyone was happy. ",
       "[Then|At last], {X} went home, tired but happy. "]
MORAL = "[{X} learned|That day {X} learned|Now {X} knew] that "


# Each plot: (subject asked for in a chat, list of parts). A part starting with `?` is kept half of the time.
PLOTS = [
    ("a lost {toy}", [
        "{X} had a {colour} {toy}. [{He} took it everywhere|It was a gift from {his} {parent}|{He} loved it more than anything else]. ",
        DAY + ", {X} [played|was playing] {at}. [{He} saw {sight1} and ran to look|There was so much to see|{He} looked at {sight1} for a long time]. "
        "When it was time to go home, the {toy} was gone! ",
        FELT_SAD, "?\"[Where can it be?|Where is my {toy}?|I must find it!]\" [{he} said|{he} cried|said {X}]. ",
        "[{X} looked {spot1}|First {he} looked {spot1}], but [it was not there|there was nothing|{he} found only a [leaf|stone|feather]]. "
        "[Then|Next] {he} looked {spot2}, [but it was not there either|but still no {toy}]. ",
        "{fX}, [{his} friend|a {fkind} from nearby], came [along|by]. \"[What is wrong|Why are you so sad|What are you looking for]?\" asked {fX}. "
        "\"I lost my {toy},\" said {X}. \"[I will help you|Let us look together|Do not worry, we will find it],\" said {fX}. ",
        "[They looked and looked|Together they looked everywhere]. [At last|Suddenly|Then], {fX} saw something {colour} {spot3}. It was the {toy}! ",
        HAPPY, "\"Thank you, {fX}!\" {he} said. ", "?[From then on, {X} always took good care of {his} {toy}|{X} shared {his} {food} with {fX}]. "]),
    ("a bird with a broken wing", [
        DAY + ", {X} was walking {at}. {He} heard a [small|weak|tiny] sound {spot1}. It was a [little|baby] bird. [Its wing was hurt|It could not fly]. ",
        "\"[Poor bird|Oh, little bird|Do not be afraid],\" said {X}. {He} [picked it up gently|held it in {his} hands|put it in a warm box]. ",
        "{X} [took|carried] the bird home. {His} {parent} [helped {him}|showed {him} how] to care for it. [Every day|Each morning], {X} gave the bird "
        "[water and seeds|some bread and water|seeds and berries]. ",
        "?[Sometimes the bird sang a soft song|The bird grew stronger each day|At night the bird slept in its box near {his} bed]. ",
        "After [a week|two weeks|many days], the wing was [well|strong] again. {X} [opened the window|took the bird outside]. "
        "\"Now you can fly,\" {he} [said|whispered]. ",
        "[{X} was a little sad, but {he} was also glad|It was hard to say goodbye]. The bird flew [up into the sky|to the top of a tree] and sang. ",
        "[The next morning|In the spring], the bird came back and sang [near {his} window|a happy song for {X}]. ",
        "?" + HAPPY]),
    ("sharing", [
        DAY + ", {X} and {his} friend {fX} [went to {place}|played {at}|were {at}]. They found a {look} {toy} {spot1}. ",
        "\"[It is mine|I saw it first|I want it]!\" said {X}. \"No, [it is mine|I saw it first|I want to play with it]!\" said {fX}. "
        "[They both pulled|They pulled and pulled|They shouted at each other] [until the {toy} fell to the ground|and nobody was happy]. ",
        "Then {old_helper} came by and asked why they were [fighting|so angry]. ",
        "\"[We both want the {toy}|There is only one {toy}],\" said {fX}. \"[Why not take turns?|You can share it.|It is more fun to play together.]\" was the answer. ",
        "{X} thought about it. \"[You can go first|You may have it first|I am sorry, {fX}],\" {he} said. {fX} smiled. \"[Thank you|I am sorry too|Let us play together],\" {fhe} said. ",
        "[They took turns all day|They played together until the sun went down|They played with the {toy} and laughed a lot]. ",
        MORAL + "[sharing is more fun than fighting|good friends share|a toy is best when you share it]. "]),
    ("baking a cake", [
        DAY + ", {X} wanted to [bake|make] a cake for {his} {parent}. [It was {pahis} birthday|{Pa} was coming home that day|{Pa} had been sick]. ",
        "{X} asked [{his} friend|] {fX} to help. They took flour, eggs, butter and [sugar|honey]. {X} [mixed|stirred] everything in a big bowl. ",
        "[But there was no milk|But the eggs fell on the floor|But they forgot the sugar]! \"[What can we do now|Oh no|Now we cannot make a cake],\" said {X}. "
        "\"[I have an idea|Wait here|Let us ask our neighbor],\" said {fX}. {fHe} ran out and came back with [what they needed|a full basket]. ",
        "Soon the cake was in the oven. [It smelled so good|The whole house smelled sweet]. When it was done, they put [{sweets}|red berries|white cream] on top. ",
        "\"Surprise!\" they [shouted|said]. {His} {parent} [hugged them both|could not believe it|clapped]. \"This is the best cake [in the world|I ever had],\" {pa} said. ",
        "?They all sat down and ate the cake together. "]),
    ("learning to [swim|ride a bike|skate|whistle|climb|fly a kite|dance|paint]", [
        "{X} wanted to learn to {skill}. [All {his} friends could do it|{fX} could do it very well|It looked like so much fun]. ",
        DAY + ", {X} tried for the first time. [It was very hard|It did not go well|It was harder than {he} thought]. {He} [made many mistakes|had to stop again and again]. ",
        "\"I will never learn it,\" {he} [said|cried]. {FELT}",
        "{His} {parent} [sat down next to {him}|took {his} hand|smiled]. \"[Nobody learns it in one day|You need to try again|I also found it hard at first],\" {pa} said. \"[Just keep trying|Try a little every day|Do not give up].\" ",
        "So {X} tried again [the next day|in the morning]. {He} tried on [Monday|Tuesday] and on [Wednesday|Thursday]. [Each day it got a little better|Bit by bit it got easier]. ",
        "Then, [one day|on Saturday|on Sunday], {X} did it! \"Look, I can {skill}!\" {he} shouted. {fX} clapped. ",
        HAPPY, MORAL + "[you must keep trying|practice makes everything easier|hard things take time]. "]),
    ("the dark", [
        "{X} was afraid of the dark. [At night {he} heard {night1}|When the light went out, {he} heard {night1} and {night2}] and [pulled the blanket over {his} head|could not sleep]. ",
        "One night, {he} called {his} {parent}. \"[There is something in my room|I am scared|I heard a noise]!\" [{he} said|said {X}]. ",
        "{His} {parent} came with a [small lamp|candle]. They looked under the bed and behind the [door|curtain]. There was only [a {toy}|an old shoe|the cat]. ",
        "\"[See, nothing is here|The dark is only the day with its eyes closed|The dark cannot hurt you],\" said {his} {parent}. \"[Listen to the sounds|Look at the stars|Look out of the window].\" ",
        "{X} [looked|listened]. It was {night1}. [It was not scary at all|It sounded almost like a song]. ",
        "[After that|From that night on], {X} was not afraid anymore. ",
        "[{He} even liked the quiet night|{He} closed {his} eyes and slept|{He} counted the stars until {he} fell asleep]. "]),
    ("telling the truth", [
        DAY + ", {X} was playing with a ball in the house. {His} {parent} had said not to do that. [Crash|Bang]! The ball hit the {colour} [vase|cup|lamp], and it broke. ",
        "{X} was scared. {He} hid the pieces [under the bed|behind the chair|in a box]. When {his} {parent} came home, {pa} asked, \"[What happened here|Did you see what broke|Who did this]?\" ",
        "\"[It was the cat|It was the wind|I do not know],\" said {X}. But it was not true, and {X} [felt bad|had a bad feeling in {his} tummy|could not eat {his} dinner]. ",
        "[In the evening|After dinner|At bedtime], {X} went to {his} {parent}. \"I am sorry. I broke it,\" {he} said [with tears in {his} eyes|in a small voice]. ",
        "{His} {parent} [hugged {him}|was quiet for a moment|looked at {him}]. \"[Thank you for telling the truth|I am glad that you told me|Everyone makes mistakes],\" {pa} said. \"[We can fix it together|Next time, play outside].\" ",
        "{X} felt [much better|light again]. " + MORAL + "[it is best to tell the truth|the truth is always better than a lie]. "]),
    ("a trip to {place}", [
        DAY + ", {X} and {his} {parent} went to {place}. They took [{food} and {food2}|a basket with {food}|a blanket and {food}]. ",
        "{X} saw {sight1} and {sight2}. \"[Look|Look over there|How wonderful]!\" {he} said. {His} {parent} [laughed|smiled] and showed {him} {sight3}. ",
        "?{X} [ran|walked] [here and there|all around] and [asked a hundred questions|looked at everything]. ",
        "[But then|Suddenly], [dark clouds came|it began to rain|the wind began to blow]. [They ran to a big tree|They hid in an old hut|They ran under a roof]. {X} [was afraid of the thunder|got wet|was cold], and {his} {parent} held {him} tight. ",
        "[Soon|After a while], the rain stopped. A [big|bright|beautiful] rainbow was in the sky! \"[It has all the colors|I can see red, yellow and blue|It is so beautiful],\" said {X}. ",
        "They ate {food} and went home. "]),
    ("a new friend", [
        "{X} had no friends, [because {he} was new in town|because {he} was very shy]. [Every day {he} played alone|{He} only watched the others play]. ",
        DAY + ", {X} saw {a_friend}. {fX} was [alone too|sitting {spot1}|trying to reach a {toy}]. {X} wanted to say hello, but {he} was [too shy|afraid]. ",
        "[Then the wind took {his} {toy}|Then {his} {toy} fell down], and {fX} [caught it|picked it up]. \"[Is this yours|Here you are|Is this your {toy}]?\" {fhe} asked. \"Yes, [thank you|thank you so much],\" said {X} [softly|in a small voice]. ",
        "\"[Do you want to play|Shall we play together|Would you like to play with me]?\" asked {fX}. {X} nodded. They [played|ran and jumped|built a castle of sand] [all day|until it was dark|all afternoon]. ",
        "\"[Will you come back tomorrow|Can we play again tomorrow]?\" asked {X}. \"[Of course|Yes, every day],\" said {fX}. ",
        HAPPY, "Now {he} had a friend. "]),
    ("a garden", [
        "{X} found a [tiny|small|round] seed {spot1}. \"[What will it be|I will plant it|I wonder what is inside],\" {he} [said|thought]. {He} put it in the ground [behind the house|near the fence] and gave it some water. ",
        "[The next day|In the morning], {X} ran to look. There was nothing. {He} looked again [the day after|on the third day]. Still nothing! {FELT}",
        "\"[You must wait|A seed needs time|Be patient],\" said {his} {parent}. \"It needs sun, rain and [love|time].\" ",
        "So {X} waited. [It rained and the sun shone|The days went by|{He} gave it water every day]. Then, one morning, there was a little green leaf! ",
        "[By summer|After some weeks|In the summer], it was a [tall|beautiful] [sunflower|rose bush|plant with red tomatoes|plant with big pumpkins]. [Bees|Butterflies] came to visit it. ",
        HAPPY, MORAL + "[good things take time|it is good to be patient|little things can grow big]. "]),
    ("too many {sweets}", [
        "{X} loved {sweets}. " + DAY + ", {his} {parent} [made|bought] a big [bowl|basket|plate] of {sweets}. \"[They are for everyone|Please take only two|Wait until dinner],\" {pa} said. ",
        "But {X} [was very hungry|could not wait|wanted them all]. {He} ate one, then two, then [five|six|ten]. Soon all of them were gone. ",
        "[Oh no|Oh dear]! {His} tummy began to hurt. {X} [lay down on the floor|went to bed|held {his} tummy]. When {fX} came to play, {X} could not [run or jump|play at all|even stand up]. ",
        "\"[I ate all the {sweets}|I am so sorry],\" {he} told {his} {parent}. {Pa} gave {him} [a cup of warm tea|some water] and [sat with {him}|told {him} to rest]. ",
        "[The next day|In the morning], {X} felt better. {He} helped to make new {sweets}, and this time {he} [gave the first one to {fX}|shared them with everyone]. ",
        MORAL + "[too much of a good thing is bad|it is better to share|it is good to stop in time]. "]),
    ("a magic {toy}", [
        DAY + ", {X} found {a_thing} {spot1}. It [shone like the sun|was warm in {his} hand|began to glow]. \"I am magic,\" said a [tiny|soft|strange] voice. \"You have one wish.\" ",
        "{X} thought for a long time. \"[I wish to fly|I wish to be as tall as a tree|I wish to be very small|I wish to talk with all the animals]!\" {he} said. [Puff|In a flash], it came true. ",
        "[At first it was great|At first it was so much fun]. {X} saw {sight1} and {sight2} as never before. But [soon|after an hour|then], {he} was [lonely|tired], because {fX} could not [come with {him}|understand {him}]. ",
        "\"I want to be [just me|the old {X}] again,\" said {X}. The {toy} [laughed|was quiet for a moment]. \"[That is a wise wish|You are very wise|So it shall be],\" it said. And {X} was [as before|back on the ground|at home again]. ",
        "{He} [ran to {fX}|hugged {fX}] and told {fhim} [everything|the whole story]. " + MORAL + "[it is best to be yourself|friends are better than magic|{he} was happy just as {he} was]. "]),
    ("a race", [
        DAY + ", there was a race {at}. {X} wanted to win. {a_friend2} wanted to win too. \"[I am the fastest|You will never catch me|I will win for sure],\" said {fX}. ",
        "\"[Ready, set, go|One, two, three, go]!\" They ran [over the hill|through the grass|down the road] as fast as they could. {fX} was [ahead|in front]. ",
        "[Suddenly|Then], {fX} fell over a [stone|root|log] and hurt {fhis} [leg|foot|knee]. \"[Ouch|Help]!\" {fhe} cried. {X} could win now! But {X} stopped. ",
        "\"[Are you hurt?|Can you stand?|Let me help you!]\" said {X}. {He} helped {fX} up, and they walked [slowly|step by step] to the end together. ",
        "They were the last, but everyone [clapped|cheered for them]. {Prize}",
        "\"[You are a true friend|I am sorry that I was so proud|Thank you for helping me],\" said {fX}. ",
        MORAL + "[helping is better than winning|a friend is worth more than a prize]. "]),
    ("getting lost", [
        DAY + ", {X} went to {place} with {his} {parent}. There were so many things to see. {X} stopped to look at {sight1}. When {he} turned around, {his} {parent} was gone! ",
        "\"[Where are you|Hello|Can you hear me]?\" {he} called. No one answered. {FELT}",
        "[Then {X} remembered what {his} {parent} always said|But {X} knew what to do]: \"If you are lost, stay where you are and ask for help.\" So {X} [stood still|sat down] {spot1}. ",
        "Soon {old_helper} came by. \"[Are you lost|Why are you alone|Can I help you], little one?\" \"Yes, [I cannot find my {parent}|I am lost],\" said {X}. ",
        "They [waited together|called together|looked together]. Then {X} heard {his} name. It was {his} {parent}! {Pa} ran to {him} and [hugged {him}|held {him} tight]. ",
        "\"[You were very brave|You did the right thing|I was so worried],\" {pa} said. \"Thank you for [your help|helping us]!\" said {X}. "]),
    ("a gift", [
        "{X} had a [friend|good friend|{fkind} friend] named {fX}, and it was [almost|nearly] {fhis} birthday. {X} wanted to give {fhim} a gift, but {he} had no money. {FELT}",
        "{He} went to {place} to think. There {he} saw {sight1}. [Then {he} had an idea|Suddenly {he} had a good idea]! {He} [took|found] [some wood|some paper|some [leaves|shells|flowers]] and [worked|began to work] [all day|for three days|until the evening]. ",
        "{X} made a {look} {colour} {toy}. It was not perfect, [but it was made with love|but {X} had done {his} best]. ",
        "At the party, the others gave {fX} [big|expensive] gifts. {X} was [shy|afraid that {his} gift was too small]. {fX} opened it [slowly|at last]. \"[Did you make this|You made this for me]?\" {fhe} asked. \"Yes,\" said {X}. ",
        "\"[It is the best gift of all|I love it|This is my favorite]!\" said {fX}. {fHe} hugged {X}. ", HAPPY,
        MORAL + "[a gift from the heart is the best gift|love is worth more than money]. "]),
    ("the snow", [
        "One winter morning, {X} woke up and looked out of the window. Everything was white! \"[Snow|It is snowing|Look at the snow]!\" {he} shouted. {He} put on {his} [{colour} hat|warm coat|{colour} scarf] and ran outside. ",
        "{fX} was already there. They [threw snowballs|made a big snowman|went down the hill on a sled]. The snowman had a carrot for a nose and [two stones|two nuts|black buttons] for eyes. ",
        "\"[He looks cold|He needs a hat|He looks lonely],\" said {X}. So {X} gave the snowman {his} own {colour2} [scarf|hat]. [Then they sang a song for him|They gave him a name, {nick}]. ",
        "[In the evening|When it got dark], {X} went inside and drank {warm}. {He} waved at the snowman from the window. ",
        "After [some days|a week], the sun came out and the snowman [melted|became smaller and smaller]. {X} was sad. \"[He will come back next winter|Do not be sad, the snow will come again],\" said {his} {parent}. "]),
    ("a {pet}", [
        DAY + ", {X} heard a [sad|strange|soft] sound {spot1}. It was a [little|tiny|lost] {pet}! It was [cold and hungry|wet and scared|all alone]. ",
        "\"[Where is your mother?|Who are you?|Do not cry!|You poor thing!]\" said {X}. {He} gave it {food} and [a warm blanket|some water]. The {pet} [stopped shaking|looked at {him} with big eyes|ate everything]. ",
        "\"Can we keep it?\" {X} asked. \"[First we must look for its mother|Maybe somebody is looking for it|It may have a home],\" said {his} {parent}. So they [went from house to house|asked everyone {at}|looked everywhere]. ",
        "[At the last house|After a long time], they met {fX}. \"[My {pet}|You found my {pet}|There you are]!\" {fhe} [shouted|cried]. The {pet} ran to {fhim}. ",
        "{X} was a little sad, but {fX} said, \"[You can visit us every day|Come and play with us|It likes you very much].\" ", HAPPY]),
    ("a boat", [
        "{X} and [{his} friend |{his} best friend |]{fX} wanted to [sail to a small island|cross the lake|go down the river]. But they had no boat. \"Let us build one,\" said {X}. ",
        "They found [some wood|an old box|a few logs] and some rope. They worked [all day|from morning to evening|for two days]. [When the boat was ready, it was very {look2}|It was a funny little boat with a {colour} sail]. ",
        "They pushed it into the water. [It floated|It swam]! But after a while, water came in. \"[We are sinking|There is a hole|Help]!\" cried {fX}. ",
        "{X} [took off {his} hat|took a cup] and threw the water out, again and again. {fX} [closed the hole with {fhis} scarf|paddled as fast as {fhe} could|put some mud on the hole]. [At last|Wet and tired], they reached the [land|shore]. ",
        "They looked at each other and laughed. \"[Next time we will build a better boat|That was a real adventure|We are a good team],\" said {X}. "]),
    ("a monster", [
        "Everyone said that a monster lived {at}. At night they heard a loud [roar|cry|noise]. Nobody dared to go there. But {X} was {mood}. \"I want to see it,\" {he} said. ",
        "{X} took {food} and a [small lamp|lantern] and went to {place}. It was [dark|very quiet]. {His} [heart beat fast|knees were shaking]. Then {he} saw two big eyes {spot1}! ",
        "\"[Who is there?|Please do not eat me!|Hello!|Are you the monster?]\" said {X}. The monster was big and {colour}, but it was crying. \"[I have a thorn in my foot|I am so lonely|I am so hungry],\" it said. \"Everyone runs away from me.\" ",
        "{X} was not afraid anymore. {He} [sat down next to it|took its big hand] and gave it {food}. {fixit}",
        "[The next day|In the morning], {X} brought the monster to the others. [At first they were afraid|First they wanted to run]. But the monster [smiled|told funny stories|carried the little ones on its back], and soon [they all liked it|they played together]. ",
        MORAL + "[you should not judge by looks|a scary face can hide a kind heart]. "]),
    ("a wise {kind}", [
        "{X} [asked many questions|wanted to know everything]. " + DAY + ", {he} asked, \"[Why is the sky blue|Where does the sun go at night|Why does it rain|How many stars are there]?\" ",
        "{His} {parent} did not know. {fX} did not know. So {X} [went to {place}|walked a long way] to ask {old_helper}. ",
        "[On the way|On the road], {X} met a [hungry|tired|thirsty] {pet}. {He} gave it {food}. Then {he} met a [cow|horse|donkey] that could not open the gate, and {X} opened it. ",
        "At last {X} asked {his} question. The answer was, \"[Nobody knows everything|I do not know either|That is a very hard question]. But I see that you [are kind to others|have a good heart|help everyone]. That is more than being clever.\" ",
        "{X} walked home and thought about it. [The {pet} and the big animal waved at {him}|On the way back, all the animals said hello]. ", HAPPY]),
]


def finish_env(rng, env):
    """Slots that depend on other slots or belong to a single plot."""
    env["skill"] = rng.choice(["swim", "ride a bike", "skate", "whistle", "climb a tree", "fly a kite", "dance", "paint", "sing", "read"])
    env["FELT"] = FELT_SAD
    env["a_friend2"] = rng.choice(["{His} friend {fX}", "{fX}, a {mood2} {fkind},", "A {fkind} named {fX}"])
    env["a_friend"] = rng.choice(["a {fkind} named {fX}", "{fX}, a {mood2} {fkind}", "{fX}"])
    env["a_thing"] = f"a {env['look']} {env['toy']}"
    env["nick"] = rng.choice(["Mister Snow", "Frosty Joe", "Old White", "Cold Bob"])
    env["warm"] = rng.choice(["a cup of cocoa", "warm milk", "hot soup", "a cup of tea"])
    env["look2"] = rng.choice(["small", "strong", "pretty", "funny"])
    env["Prize"] = rng.choice(["", "The judge gave both of them a prize. ", "They even got a golden cup. "])
    env["fixit"] = rng.choice(["They talked until the moon was high. ", "Then {he} helped it, and it stopped crying. ",
                               "\"You are kind,\" said the monster. "])


def story(rng):
    """Returns (subject, text): what a request for this story would name, and the story."""
    env = new_env(rng)
    finish_env(rng, env)
    subject, parts = rng.choice(PLOTS)
    if subject.startswith("learning"):
        subject = "learning to {skill}"
    text = rng.choice(OPEN)
    for part in parts:
        if not part.startswith("?"):
            text += part
        elif rng.random() < 0.5:
            text += part[1:]
    used_friend = any("{fX}" in p for p in parts)
    ends = END if used_friend else END[1:]
    if rng.random() < 0.75:
        text += rng.choice(ends)
    asked = [subject, subject, "a {subject}", "{X}", "a {kind}"] + ["{X} and {fX}"] * used_friend
    asked = expand(rng, "{X} " + rng.choice(asked), env)[len(env["X"]) + 1:]
    return asked, expand(rng, text, env)


if __name__ == "__main__":
    import random
    import sys
    generator = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for _ in range(12):
        print(*story(generator), sep="\n", end="\n\n")
