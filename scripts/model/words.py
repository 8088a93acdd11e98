"""Words the corpus is made of: people, animals, places, things, facts.

Only data. How the words become stories is in `stories.py`, how they become questions in `chat.py`.
Invariant: every list has a fixed order, so that the same seed always picks the same words.
"""

GIRLS = """Lily Mia Anna Sara Emma Lucy Molly Ella Nora Ruby Rosie Zoe Amy Clara Daisy Eva Grace Hannah Ivy
Jane Kate Lena Maya Nina Olive Penny Rosa Sophie Tina Wendy Alice Bella Carla Dora Mary Julia""".split()
BOYS = """Tom Ben Max Sam Jack Leo Tim Noah Finn Oscar Adam Alex Billy Charlie Dan Eric Felix George Harry Ian
Jake Kevin Luke Mark Nick Oliver Peter Ravi Simon Theo Victor Will Hugo David Paul John""".split()
PETS = """Pip Bibi Coco Dot Fuzzy Momo Nibbles Poppy Rufus Scout Sunny Tiny Waffles Ziggy Bruno Hazel Toto
Pebble Clover Biscuit Rex Spot Bella Lucky Fluffy Snowy""".split()

# Animals that can be the hero of a story, with where they live.
HEROES = [
    ("rabbit", "under an old oak tree"), ("fox", "at the edge of the forest"), ("mouse", "in a tiny hole in the wall"),
    ("duck", "by a quiet pond"), ("owl", "in a tall tree"), ("hedgehog", "under a pile of leaves"),
    ("squirrel", "in a hollow tree"), ("frog", "beside a green pond"), ("turtle", "near a slow river"),
    ("kitten", "in a house with a red door"), ("puppy", "on a busy farm"), ("lamb", "on a grassy hill"),
    ("goat", "on a high mountain"), ("bee", "in a garden full of flowers"), ("ant", "in a little hill of sand"),
    ("penguin", "on a big piece of ice"), ("elephant", "near a wide river"), ("monkey", "in the middle of the jungle"),
    ("bear", "in a warm cave"), ("deer", "in a deep forest"), ("pig", "in a muddy pen"), ("chick", "in a red barn"),
    ("snail", "under a big leaf"), ("crab", "on a sandy beach"), ("fish", "in a blue lake"), ("parrot", "on a sunny island"),
]

# (place with its preposition, bare place, what can be seen there, hiding places there)
PLACES = [
    ("in the park", "the park", ["a big slide", "some ducks on the pond", "children on the swings", "a man with a kite"],
     ["under a bench", "behind a tree", "near the pond", "under the slide"]),
    ("in the garden", "the garden", ["red roses", "a fat worm", "a butterfly on a leaf", "a row of carrots"],
     ["behind the roses", "under a bush", "next to the fence", "in the long grass"]),
    ("at the beach", "the beach", ["white shells", "a small crab", "big waves", "a boat far away"],
     ["in the sand", "behind a rock", "under a towel", "beside an old boat"]),
    ("in the forest", "the forest", ["tall trees", "a squirrel with a nut", "yellow mushrooms", "a little stream"],
     ["behind a log", "under some leaves", "beside a big stone", "in a hollow tree"]),
    ("on the farm", "the farm", ["two brown cows", "a noisy rooster", "a pink pig", "a red tractor"],
     ["behind the barn", "in the hay", "near the gate", "under the tractor"]),
    ("at school", "school", ["a map on the wall", "a box of paints", "many books", "a picture of a whale"],
     ["under a desk", "on a shelf", "behind the door", "in the toy box"]),
    ("at the market", "the market", ["baskets of apples", "a woman with flowers", "fresh bread", "a man with balloons"],
     ["under a table", "behind a basket", "next to the bread", "beside a cart"]),
    ("by the river", "the river", ["smooth stones", "a green frog", "a wooden bridge", "three silver fish"],
     ["under the bridge", "between two stones", "in the reeds", "behind a log"]),
    ("in the library", "the library", ["long rows of books", "a soft blue chair", "a globe", "a quiet old man"],
     ["between two books", "under a chair", "on the lowest shelf", "behind the desk"]),
    ("at the lake", "the lake", ["white swans", "a tiny boat", "clear water", "a family of ducks"],
     ["in the reeds", "under a boat", "near the dock", "behind a tree"]),
    ("on the hill", "the hill", ["the whole town below", "sheep in the grass", "an old tower", "dark clouds far away"],
     ["in the tall grass", "behind a rock", "under a small tree", "next to the path"]),
    ("at the playground", "the playground", ["a tall ladder", "a sandbox", "a red swing", "some older children"],
     ["in the sandbox", "under the swing", "behind the ladder", "next to a bench"]),
    ("in the meadow", "the meadow", ["yellow flowers", "a busy bee", "a white horse", "many butterflies"],
     ["in the tall grass", "under a flower", "behind a bush", "near the fence"]),
    ("at the zoo", "the zoo", ["a sleepy lion", "a tall giraffe", "funny monkeys", "a gray elephant"],
     ["near the gate", "under a bench", "behind a bush", "beside the fountain"]),
]

TOYS = ["ball", "kite", "doll", "teddy bear", "toy train", "toy car", "drum", "puzzle", "hat", "scarf", "bell", "book",
        "wooden boat", "blanket", "ring", "yo-yo", "flute", "lantern", "toy robot", "paper plane", "bucket", "cup"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "pink", "orange", "purple", "gray"]
LOOKS = ["shiny", "soft", "old", "new", "little", "big", "pretty", "bright", "tiny", "round", "special", "lovely"]
KIND = ["kind", "brave", "clever", "curious", "cheerful", "gentle", "quiet", "friendly", "happy", "shy", "funny", "patient"]
FOODS = ["an apple", "some bread", "a slice of cake", "a bowl of soup", "some cookies", "a pancake", "warm milk",
         "a sandwich", "some berries", "a pear", "some cheese", "a banana", "a cup of cocoa", "a piece of pie"]
SWEETS = ["cookies", "cherries", "pancakes", "berries", "plums", "muffins", "candies", "pies", "peaches", "grapes"]
SOUNDS_NIGHT = ["the wind in the trees", "an owl outside", "the old clock", "a dog far away", "the rain on the roof"]

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("day", "night"), ("happy", "sad"), ("fast", "slow"),
    ("tall", "short"), ("hard", "soft"), ("wet", "dry"), ("open", "closed"), ("light", "dark"), ("old", "young"),
    ("full", "empty"), ("loud", "quiet"), ("near", "far"), ("early", "late"), ("strong", "weak"), ("clean", "dirty"),
    ("heavy", "light"), ("left", "right"), ("high", "low"), ("in", "out"), ("on", "off"), ("good", "bad"),
    ("thick", "thin"), ("wide", "narrow"), ("rich", "poor"), ("first", "last"), ("front", "back"), ("begin", "end"),
    ("awake", "asleep"), ("sweet", "sour"), ("rough", "smooth"), ("push", "pull"), ("win", "lose"),
    ("give", "take"), ("buy", "sell"), ("come", "go"), ("laugh", "cry"), ("love", "hate"), ("question", "answer"),
    ("top", "bottom"), ("inside", "outside"), ("always", "never"), ("before", "after"), ("more", "less"),
    ("easy", "difficult"), ("true", "false"), ("same", "different"), ("friend", "enemy"), ("summer", "winter"),
    ("north", "south"), ("east", "west"), ("yes", "no"), ("black", "white"), ("sharp", "blunt"),
    ("deep", "shallow"), ("safe", "dangerous"), ("beautiful", "ugly"), ("start", "stop"),
    ("under", "over"), ("above", "below"), ("sit", "stand"), ("tight", "loose"), ("noisy", "silent"),
]
ANIMAL_SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink", "horse": "neigh",
    "rooster": "cock-a-doodle-doo", "hen": "cluck", "bee": "buzz", "frog": "ribbit", "owl": "hoot", "lion": "roar",
    "snake": "hiss", "mouse": "squeak", "crow": "caw", "donkey": "hee-haw", "wolf": "howl", "bird": "tweet",
    "chick": "cheep", "dove": "coo", "turkey": "gobble", "goose": "honk", "cricket": "chirp", "elephant": "toot",
    "bear": "growl", "kitten": "mew", "puppy": "yap",
}
ANIMAL_COLOURS = {
    "frog": "green", "flamingo": "pink", "polar bear": "white", "crow": "black", "canary": "yellow", "elephant": "gray",
    "fox": "orange", "swan": "white", "mouse": "gray", "ladybug": "red", "chick": "yellow", "pig": "pink", "crocodile": "green",
    "lion": "golden", "deer": "brown", "monkey": "brown", "dolphin": "gray", "lobster": "red", "raven": "black",
    "bear": "brown", "goldfish": "orange", "hippo": "gray", "sheep": "white", "grasshopper": "green", "donkey": "gray",
    "beaver": "brown", "wolf": "gray", "dove": "white", "panda": "black and white", "zebra": "black and white",
    "penguin": "black and white", "tiger": "orange and black", "bee": "yellow and black", "bluebird": "blue", "camel": "brown",
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"]

# Words for lists to repeat; the first 64 of them are those that are sorted.
LIST_WORDS = """apple ball cat dog egg fish goat hat ice jam king lamp moon nest owl pig queen rain sun tree uncle van
wolf yard zebra ant bear cake duck ear farm garden horse island juice kite leaf milk nut ocean pear river snow table
umbrella village water bread cloud door flower grass house jar lion mouse night orange pen rose star train window
bird boat book box bus chair clock coat cow cup desk doll drum fire fox frog glass hand hill key knife lake mountain
paper park plate pond rabbit ring road rock salt sand school sheep ship shoe spoon stone street tiger toy wall wind
butter candle carrot castle cheese circle coin corn feather finger forest hammer honey ladder lemon letter mirror
monkey needle nose onion peach pencil pillow potato pocket ribbon rope shell shirt soap sock soup squirrel summer
tiger turtle violin wagon whale winter wood""".split()
LIST_WORDS = list(dict.fromkeys(LIST_WORDS))
SORT_WORDS = LIST_WORDS[:64]

# Topics that the model knows nothing about: it says so, and it can repeat the words.
TOPICS = """computer internet engine machine robot planet science history money bank business company government law
president country language grammar poetry art museum photograph camera film theater opera guitar piano electricity
battery magnet energy gravity light atom chemistry biology physics mathematics geometry algebra statistics software
hardware network keyboard screen printer telephone radio television satellite telescope microscope rocket airplane
helicopter submarine bicycle motor highway traffic bridge tunnel railway factory industry economy price tax insurance
marriage religion philosophy psychology culture tradition festival holiday sport tennis hockey baseball basketball
volleyball marathon olympics medal medicine vaccine virus bacteria blood heart brain muscle skeleton dentist surgery
vitamin protein recipe restaurant coffee chocolate pizza pasta salad spinach tomato cucumber garlic pepper vinegar
volcano earthquake hurricane tornado desert glacier canyon continent ocean climate pollution recycling weather
dinosaur fossil mammal reptile insect spider octopus shark gorilla kangaroo koala leopard cheetah rhino walrus ostrich
peacock pelican eagle falcon vulture sparrow woodpecker lizard tortoise salmon tuna jellyfish coral seaweed bamboo
cactus tulip daisy orchid oak pine maple granite diamond emerald silver copper iron steel plastic rubber leather cotton
silk velvet furniture carpet mattress kitchen bathroom basement balcony elevator architecture cathedral pyramid
skyscraper lighthouse prison court judge lawyer police soldier army navy general captain engineer scientist
astronaut architect journalist newspaper magazine novel author publisher dictionary alphabet sentence paragraph
election democracy parliament minister mayor embassy passport visa airport luggage hotel tourist vacation adventure
puzzle chess lottery violin trumpet orchestra symphony rhythm melody ballet costume jewelry perfume fashion mirror
calendar century decade minute second hour schedule appointment meeting project report budget salary career
university college professor student exam homework diploma logic theory experiment laboratory evidence opinion
freedom justice peace war treaty border immigration population village suburb neighborhood street address
email password website database algorithm program download server memory processor cable antenna signal""".split()
