"""Write the sample dialogues of `resource/sample/`: messenger chats with summaries, all made here.

    python resource/make_sample.py        # writes resource/sample/{train,validation,test}.jsonl, always the same bytes

No row is copied from any corpus. Every second one was written freely, by language models, about all of life
(`sample_rows` in `chats.py`). The others come from a small grammar: a scenario (a dinner, a lost key, a late train ...)
has an opening and several ways to end, every line has several wordings, and its slots (who, what, where, when) are
filled from pools. The pools of train, validation and test are disjoint, so a held-out row of the grammar cannot share
its people, places and things with one of training; the freely written ones draw their names from the same pools. Days,
hours, prices and the like are common to all.

A fourth source, `pretrain`, is endless: it adds invented words and names, and many real names (REAL_NAMES), so that a
model trained on it learns to copy what it has never seen. It also gives a `narration`, the same chat retold in reported
speech.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from pathlib import Path

SIZES = {"train": 2000, "validation": 200, "test": 200}  # half of them the grammar's
SEED = 2024
MIN_TURNS, MAX_TURNS = 4, 14
MAX_DIALOGUE_WORDS, MIN_SUMMARY_WORDS, MAX_SUMMARY_WORDS = 110, 9, 32

# ----------------------------------------------------------------------------------------------------------------------
# The language of the tables below
#
#   [a|b|]        one of the wordings, the last one empty
#   <yes>         a macro of MACROS
#   {item}        the value of a slot; {item.a} with its article, "a scarf"
#   {A} {A.he}    a person and the pronouns: he, him, his, himself, poss ("Anna's")
#
# A scenario of SCENARIOS starts with "# title: slot=pool, ..."; a slot that is not declared has the pool of its own
# name without its digit ({dish2}: dish). Slots of one ordered kind (hours, days, prices) rise with their number.
#   A: ...        a turn by role A; `?A:` may be left out
#   > ...         the turn above, retold in the third person (for `narration`)
#   ~             a place where small talk may go
#   -- name       one way to go on and end (everything before the first `--` opens all of them)
#   = ...         a summary of this ending, without he or she for who talks: a name alone does not say which
# An indented line continues the one above.
# ----------------------------------------------------------------------------------------------------------------------

MACROS = {
    "hi": "[hi|hey|hello|heya|hiya]",
    "yes": "[sure|yeah|yes|of course|yep|ok|no problem|absolutely]",
    "great": "[great|cool|perfect|awesome|brilliant|sounds good|lovely|nice]",
    "thanks": "[thanks|thank you|thanks so much|thanks a lot|cheers|thanks a million]",
    "no": "[oh no|nooo|damn|ugh|oh dear|that's awful|poor you]",
    "busy": "[I have to work late|I've got a late shift|I'm babysitting|I have a deadline|my parents are visiting"
    "|I promised to help my gran|I have a rehearsal|I have to fix something first]",
}

# Values that every split may use: they carry no story of their own.
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COMMON = {
    "day": DAYS,
    "time": ["5 pm", "5:30", "6 pm", "6:15", "6:30", "7 pm", "7:15", "7:30", "8 pm", "8:15", "8:30", "9 pm"],
    "hour": ["6 am", "7:30", "8 am", "8:30", "9 am", "9:15", "9:30", "10 am", "10:30", "11 am", "11:15", "noon"],
    "price": [f"{n} {unit}" for n in (12, 15, 18, 20, 25, 30, 35, 40, 45, 60, 75, 80) for unit in ("euros", "pounds")],
    "fare": [f"{n} {unit}" for n in (90, 110, 120, 150, 180, 220, 250, 300, 350, 420) for unit in ("euros", "pounds")],
    "minutes": ["15 minutes", "20 minutes", "25 minutes", "40 minutes", "50 minutes", "an hour", "90 minutes"],
    "weeks": ["a week", "ten days", "two weeks", "three weeks", "a month"],
    "month": [
        *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
        *("November", "December"),
    ],
    "mark": ["61%", "64%", "68%", "72%", "75%", "79%", "83%", "86%", "88%", "91%", "94%", "97%"],
    "number": ["3", "4", "5", "6", "8", "10", "12"],
    "kin": ["sister", "brother", "mum", "dad", "aunt", "uncle", "cousin", "grandma", "grandpa", "niece", "nephew"],
    "spot": [
        *("under the sofa", "in the fridge", "on the piano", "behind the door", "in the car", "on my desk"),
        *("in the bathroom", "in the laundry basket", "next to the toaster", "on the window sill", "in your coat"),
    ],
}
ORDERED = ("day", "time", "hour", "price", "fare", "minutes", "weeks")  # slots of these kinds rise with their number

SPLITS = ("train", "validation", "test")

# First names: women and men, one line for each split.
WOMEN = {
    "train": """Alice Amelia Amy Anita Anna Astrid Ava Barbara Beatrice Bella Bianca Brigitte Camille Carla Carmen
        Caroline Catherine Chloe Clara Claire Daniela Diana Dorothy Elena Elisa Ella Emily Emma Erika Esther Eva Fatima
        Fiona Frances Freya Gabriela Gemma Greta Hannah Heather Helen Ines Irene Isabel Jane Jasmine Jessica Joanna
        Julia Karen Kate Laura Lea Lena Linda Lisa Lucy Magda Maria Martha Maya Megan Mia Monica Nadia Nina Nora Olga
        Olivia Paula Petra Rachel Rebecca Rita Rosa Ruth Sandra Sara Silvia Sophie Susan Tanya Teresa Vera""",
    "validation": """Abigail Agnes Aisha Bridget Celine Cora Delia Edith Florence Gloria Hazel Imogen Judith Kirsten
        Lydia Mabel Naomi Odette Priya Rosalind Stella Yvonne""",
    "test": """Adele Bettina Cecilia Daphne Eleanor Felicity Ginevra Harriet Ingrid Jolanda Kerstin Leonie Matilda Nell
        Ottilie Penelope Ramona Saskia Tabitha Ursula Valerie Zoe""",
}
MEN = {
    "train": """Adam Adrian Albert Alan Alex Andrew Anton Arthur Ben Bernard Boris Brian Bruno Carl Carlos Charles
        Chris Colin Daniel David Dennis Diego Dominic Edward Emil Eric Ethan Felix Francis Fred Gabriel George Greg
        Gustav Harry Henry Hugo Ian Igor Ivan Jack Jacob James Jan Jason Joel John Jonas Joseph Julian Kevin Kurt Lars
        Leo Liam Louis Lucas Marco Martin Matt Max Michael Miguel Nathan Nick Noah Oliver Omar Oscar Owen Patrick Paul
        Pedro Peter Philip Ralph Raul Richard Robert Rudi Ryan Sam Simon Stefan Steve Theo Thomas Tim Tom Victor""",
    "validation": """Alastair Benedict Conrad Duncan Edgar Fabian Gilbert Hamish Isaac Jerome Kieran Lionel Magnus
        Neville Otto Preston Quentin Rafael Sebastian Tobias Vincent Walter""",
    "test": """Ambrose Bartholomew Clement Desmond Elliot Ferdinand Gareth Humphrey Ismael Jasper Kaspar Lorenzo
        Malcolm Nikolai Orlando Percy Roderick Sylvester Terence Ulrich Wilfred Xavier""",
}

# The other pools: train / validation / test / invented (for `pretrain`: * is an invented word, ^ an invented name).
POOLS = """
town:     Leeds, Bristol, Cardiff, York, Dublin, Lyon, Hamburg, Krakow, Porto, Turin, Oslo, Bergen, Ghent, Utrecht,
          Basel, Vienna, Seville, Malmo, Brighton, Exeter, Norwich, Glasgow, Bologna, Nantes, Leipzig, Gdansk
        / Coventry, Toulouse, Salzburg, Aarhus, Granada, Rotterdam, Derby, Trieste
        / Plymouth, Marseille, Innsbruck, Uppsala, Valencia, Antwerp, Swansea, Verona / ^
resort:   Corsica, Iceland, Scotland, Tuscany, Madeira, Norway, Brittany, Cornwall, Sicily, Croatia, Portugal, Cyprus,
          Ireland, Slovenia, Menorca, Finland, Provence
        / Sardinia, Bulgaria, Tenerife, Estonia, Normandy / Malta, Albania, Gotland, Andalusia, Latvia / ^
venue:    the [Blue|Golden|Crooked|Hungry|Old] [Anchor|Lemon|Teapot|Goose], Luigi's, Cafe Mondo, the Corner House,
          Mama Lu's, the Noodle Bar, Cafe Central, Tandoori Palace
        / the [Silver|Sleepy] [Badger|Spoon], Cafe Aurora, Giovanni's
        / the [Purple|Dancing] [Walrus|Barrel], Cafe Belmonte, Yannis's / [the ^|Cafe ^|^'s|the ^ Bar|the * ^]
street:   [Mill|Church|Station|Oak|Park|Rose|Bridge|High] [Lane|Street|Road]
        / [Harbour|Chestnut|Windmill] [Avenue|Close] / [Orchard|Saddler|Juniper] [Terrace|Square] / ^ [Street|Lane|Road]
dish:     lasagne, pizza, curry, ramen, tacos, sushi, mushroom soup, paella, risotto, fried rice, dumplings, pea soup,
          goulash, fish pie, chili, pancakes, roast chicken, noodles, stew, couscous, potato salad
        / moussaka, gnocchi, falafel, ratatouille, onion tart, kebabs / burritos, bouillabaisse, pierogi, meatballs,
          shakshuka, polenta / [*|* soup|* pie|fried *]
gift:     scarf, board game, coffee machine, perfume set, cookbook, backpack, necklace, wine rack, photo album, mug,
          silver ring, puzzle, lamp, watch, blanket, record player, picnic basket, calendar, teddy bear
        / kite, telescope, music box, hammock, vase, chess set / fountain pen, snow globe, bracelet, sleeping bag,
          candle holder, jigsaw / [*|* lamp|red *|* set|silver *]
lost:     wallet, passport, umbrella, key ring, jacket, notebook, bus pass, left glove, water bottle, ID card,
          blue hat, charger, credit card, library card, sports bag, laptop case
        / sunhat, briefcase, earring, penknife, season ticket / lunchbox, brooch, door key, rucksack, student card
        / [*|green *|* bag|* card|* case]
subject:  chemistry, maths, history, biology, French, statistics, geography, law, economics, music, German, art
        / physics, Latin, astronomy, Spanish / philosophy, Italian, geology, sociology / [*ics|*ology|^ish]
appliance: boiler, washing machine, dishwasher, heating, oven, shower, fridge, doorbell, TV, vacuum cleaner, toaster
        / tumble dryer, freezer, extractor fan, intercom / water heater, microwave, cooker, radiator
        / [*|* machine|* heater|*er]
firm:     Brown & Sons, QuickFix, Handy Hands, Novak Repairs, FixIt, Miller Services, Ace Repairs, Blue Van, HomeTech
        / Tinker Brothers, ProServe, Hill & Daughter / Spanner Queens, RapidCare, Grant & Co / [^|^ & Sons|^ Repairs]
company:  a bakery, the town hall, Nordbank, a travel agency, the hospital, Lumina, the city museum, Greenline, the zoo,
          Orbit Media, the airport, Castle Hotel, a law firm
        / a shipyard, Bluewater Foods, the opera house, Kestrel Air / a brewery, the aquarium, Solaris Labs, Fernwood
        / [^|the ^ Hotel|^ Media|a * shop]
job:      nurse, driver, cook, teacher, waiter, receptionist, engineer, designer, lawyer, gardener, accountant, editor,
          programmer, baker, translator, salesperson, librarian
        / plumber, architect, lifeguard, tour guide / florist, electrician, press officer / [*er|*ist|* maker]
garment:  grey suit, red dress, white shirt, black blazer, silk blouse, leather jacket, wool coat, green tie
        / navy cardigan, linen suit, velvet skirt / striped waistcoat, tweed jacket, satin gown
        / [* suit|* coat|grey *]
pet:      cat, dog, guinea pig, goldfish, canary, puppy, kitten / hamster, tortoise, parrot / rabbit, ferret, budgie
        / [*|* dog|* cat]
petname:  Milo, Luna, Biscuit, Rocky, Daisy, Coco, Ziggy, Pepper, Rex, Misty, Oreo, Shadow, Ginger, Bobby, Tiger, Molly
        / Waffles, Nugget, Bandit, Pickle, Duchess / Toffee, Bruiser, Marble, Zorro, Peanut / ^
ailment:  ear infection, stomach bug, cold, bad tooth, food allergy, eye infection, tick bite, fever
        / lung infection, swollen paw, skin fungus / broken claw, kidney stone, virus / [*|* infection|bad *]
loan:     drill, tent, ladder, suitcase, camera, bike, guitar, lawnmower, hammer, tripod, skateboard, bread tin
        / wheelbarrow, surfboard, sewing machine, torch / kayak, projector, fishing rod, pressure washer
        / [*|* drill|* box|big *]
sport:    football, volleyball, basketball, hockey, tennis, rugby, badminton, judo, handball, table tennis
        / cricket, lacrosse, squash / water polo, netball, frisbee / [*|*ball]
ground:   the school field, the new hall, the old gym, the city stadium, Elm Park, the sports centre, the river meadow
        / Beacon Field, the north hall / Hawthorn Park, the barracks gym / [^ Park|the ^ hall|the * field]
team:     the Tigers, the Rockets, Northside, the Wolves, Green Star, United, the Hawks, Riverside
        / the Stallions, Eastgate, the Comets / the Vikings, Westbrook, the Hornets / [the ^s|^ United|^]
band:     the Paper Lions, Night Bakery, Velvet Radio, the Lost Socks, Electric Pear, Cold Harbour, the Third Floor,
          Tin Parade, Sugar Engine, the Mondays
        / Glass Pigeons, the Quiet Riots, Lemon Thunder / Plastic Orchestra, the Midnight Plumbers, Copper Foxes
        / [the ^s|^ *|* Lions|^]
film:     Silent Harbour, The Last Lighthouse, Robot Summer, Two Tickets, Ghost of the Opera, Midnight Bus, The Lodger,
          Red Winter, Space Farmers, Dead Line, The Tailor's Son, Crocodile Season
        / Paper Castles, The Drowned City, Return to Sender / Velvet Storm, The Clockmaker, Goodbye Saturn
        / [The ^|^|The * Man|Red ^]
cinema:   the Odeon, Star Cinema, the Filmhouse, the Regal, CineCity, the Capitol
        / the Majestic, Cinema Nova / the Palladium, the Lantern / [the ^|^ Cinema]
ingredient: cream, garlic, butter, ginger, mushrooms, honey, coconut milk, spinach, cheese, peanuts, tomatoes, eggs,
          carrots, yoghurt, lemons, basil / walnuts, leeks, sour cream, aubergines, mustard
        / almonds, courgettes, goat's milk, chickpeas, saffron / [*|*s|* oil|* milk]
goods:    keyboard, desk lamp, raincoat, tea set, dress, printer, pair of boots, monitor, phone cover, wetsuit, mirror,
          yoga mat, mattress / fish tank, ukulele, helmet, bath mat / typewriter, inkjet cartridge, poncho, globe
        / [*|* lamp|pair of *s|* set]
shop:     Megamart, Lindas, Shopolis, Freshway, Polar, Marketplus, Harpers, Tenfold, Urbano, Kingmart
        / Daybreak Stores, Pommes, Zentro / Fairdeal, Oldham's, Quarto / [^|^mart|^'s]
furniture: sofa, bookcase, armchair, wardrobe, dining table, desk, chest of drawers, bed, carpet, coffee table
        / rocking chair, sideboard, bunk bed / bar stool, dressing table, footstool / [*|* table|* chair]
chore:    dishes, laundry, bathroom, ironing, hoovering, kitchen floor, dusting, lawn / windows, staircase, curtains
        / recycling, attic, cellar / [*ing|* floor|*]
ache:     sore throat, headache, rash, stomach ache, stiff neck, cough, bad back, migraine, toothache
        / blocked ear, swollen foot, blister / sprained wrist, nosebleed, black eye / [* ache|bad *|*itis]
doctor:   dentist, dermatologist, family doctor, eye doctor, physiotherapist, surgeon
        / chiropractor, allergist / orthopaedist, ENT specialist / [*ologist|* doctor]
topic:    volcanoes, the Roman army, solar power, whales, the moon landing, fast food, electric cars, medieval castles,
          the Amazon river, vaccines, city traffic, dreams, honeybees, the French revolution
        / glaciers, the Silk Road, wind turbines, bats / coral reefs, the Vikings at sea, nuclear fusion, gold mines
        / [*s|the * war|* power|the ^ river]
device:   phone, tablet, laptop, smartwatch, e-reader / headset, game console / hard drive, video camera / [*|*phone]
cake:     carrot cake, cheesecake, apple pie, chocolate cake, banana cake, lemon tart, cherry pie
        / plum crumble, marble cake, raspberry roulade / walnut loaf, rhubarb pie, poppy seed cake / [* cake|* pie]
instrument: trumpet, drums, saxophone, violin, accordion, piano, bagpipes / oboe, tuba / banjo, harp / *
plant:    orchid, cactus, palm tree, fern, rubber plant, tomato plant, bonsai / ficus, begonia, chilli plant
        / azalea, yucca, olive tree / [*|* plant|* tree]
hobby:    pottery, salsa, photography, yoga, calligraphy, boxing, sewing, climbing, Japanese, knitting, tap dance
        / archery, tango, woodcarving / fencing, origami, bookbinding / [*ing|*|^ish]
school:   the art school, the community centre, Studio Nine, the music school, the evening college, Room 12
        / the guildhall, Studio Verde / the old fire station, Academy Lund / [Studio ^|the ^ school]
book:     The Salt Road, A Winter in Rome, The Beekeeper's Wife, Nine Letters, House of Dust, The Long Way Down,
          Little Thieves, The Glass Orchard, Before the Tide
        / The Ninth Widow, Maps of Nowhere, A Quiet Arson / The Cartographer, Salted Plums, An Honest Spy
        / [The ^|A * in ^|The * Road]
babyname: Poppy, Finn, Ivy, Robin, Lily, Toby, Mila, Arlo / Juniper-May, Casper, Elodie / Maximilian, Wren, Thea / ^
sight:    the castle, the botanical garden, the science museum, the old lighthouse, the caves, the wildlife park,
          the flea market, the toy museum / the observatory, the tulip fields, the salt mine
        / the planetarium, the windmills, the cathedral tower / [the * museum|^ Castle|the ^ caves]
"""

# Small talk: it has nothing to do with the summary. X has just spoken, Y is another speaker.
SMALL_TALK = """
X: [btw|by the way|oh,] [did you watch|have you seen] {film9} [yet|]?
> {X} asks whether {Y} has seen {film9}.
Y: [nope|not yet|yes, it was ok]
> {Y} answers.

X: [it's so hot today|this rain is killing me|is it snowing at yours too?]
> {X} mentions the weather.
Y: [I know|same here|tell me about it]

X: [are you at work|you at home]?
> {X} asks where {Y} is.
Y: [yes, so boring|no, on the bus|in the bath lol]
> {Y} answers.

Y: [how's your {kin9}|how is your {kin9} doing]?
> {Y} asks about {X.poss} {kin9}.
X: [much better|all good|fine, thanks for asking]
> {X} says all is well.

X: [I'm starving|so hungry]
> {X} is hungry.
Y: [eat some {ingredient9}|there's {dish9} in the fridge] [haha|]
> {Y} mentions food.

X: [brb, phone|sec, someone at the door]
> {X} is interrupted.
X: [back|sorry, back again]

Y: [wait|one sec], [I'm in a meeting|my boss is looking]
> {Y} is at work.
X: [ok|take your time|no rush]
Y: [ok gone|done|I'm back]

X: [do you know|have you ever tried] {venue9}? [I was there|we went there] [on {day9}|last week] with {Q9}
> {X} was at {venue9} with {Q9}.
Y: [no, any good|never heard of it|is it nice]?
X: [the food was cold|so so|it was ok, bit loud]
> {X} did not like it very much.

Y: [sorry for the late answer|sorry, only saw this now], [my {device9} was off|I was in the shower|I fell asleep]
> {Y} is sorry for the late answer.
X: [no worries|it's fine|happens]

X: [guess who I met|you'll never guess who I saw] [in town|at {shop9}]: {Q9}!
> {X} has met {Q9}.
Y: [really|no way]! [how is {Q9.he}|what's {Q9.he} up to]?
> {Y} asks how {Q9} is.
X: [good|fine I think], {Q9.he}'s {job9.a} now
> {X} says that {Q9} is {job9.a} now.

Y: [my train is so full|I missed the bus again|I'm still in bed] [lol|haha|]
X: [poor you|lucky you|every day the same]

X: [I have|I've got] {ache9.a} [today|since {day9}], [awful|so annoying]
> {X} has {ache9.a}.
Y: [get well soon|oh no, get some rest]
> {Y} wishes {X} well.

Y: [just made|I'm eating] {dish9}, [too much salt|so good|want some?]
> {Y} is eating {dish9}.
X: [yum|send me some|I had that on {day9}]
"""

# A newcomer Z reads along in a chat of two.
NEWCOMERS = """
Z: [what's going on here|what did I miss|so many messages]?
> {Z} asks what is going on.
Y: [scroll up|nothing for you|just read] [lol|haha|]
> {Y} tells {Z} to read the messages.

Z: [is anyone watching|who is watching] the match [tonight|later]?
> {Z} asks about the match.
Y: [not now {Z}|me, later]
> {Y} answers {Z}.

Z: [has anyone seen my {device9}|where is my {device9}]?
> {Z} asks about a {device9}.
X: [try the kitchen|no, sorry {Z}|you had it this morning]

Z: [can somebody call me|I need your help later], [it's about|because of] my {kin9}
> {Z} wants to talk about {Z.his} {kin9}.
Y: [in a minute|after this], {Z}

Z: [who ate my|somebody ate my] {dish9}?!
> {Z} asks who ate the {dish9}.
Y: [not me|ask {Q9}|oops] [lol|haha|]

Z: [did you hear about|have you heard from] {Q9}?
> {Z} asks about {Q9}.
X: [later|no idea, why], {Z}
> {X} answers {Z}.
"""

GREETINGS = """
A: <hi> {B}[!|]
> {A} greets {B}.
B: [hi|hey|hello] {A}, [what's up|how are you|all good?]

A: [are you there|you there|got a minute]?
> {A} asks if {B} has time.
B: [yes|yep|for you always]

B: [good morning|good evening|<hi>] {A}
A: [hi|hey|hello you]
"""

FAREWELLS = """
B: [see you|bye|talk later|take care|cu]
A: [bye|see ya|later]

A: [gotta go|have to run], bye
B: [bye|ok, bye bye]

B: [hugs|kisses|have a nice day]

A: [let's talk later|I'll call you later|write me later], [dinner's ready|my phone is dying|I'm on the bus]
B: [ok|sure|yes], bye
"""

# Chat shorthand: each speaker uses it more or less.
SHORTHAND = {
    "you": "u", "are": "r", "your": "ur", "please": "pls", "thanks": "thx", "because": "cuz", "tomorrow": "tmrw",
    "tonight": "2nite", "really": "rly", "people": "ppl", "going to": "gonna", "want to": "wanna", "Don't": "Dont",
    "don't": "dont", "can't": "cant", "I'm": "im", "I'll": "ill", "see you": "cu", "great": "gr8", "about": "abt",
}  # fmt: skip
HAPPY = ["🙂", "😊", "😅", "👍", "🙈", ":)", ":D", ";)", "😉", "🎉", "☺️", "xx"]
SAD = ["😢", "😔", ":(", "😩", "🙁", "😱", ":/"]
SAD_WORDS = re.compile(
    r"\b(no(?! problem| worries| wonder| rush)|nooo|not(?! bad)|(?<!not )bad|can't(?! wait)|cant(?! wait)|sorry|pity"
    r"|damn|ugh|broken|lost|aww|poor|oh dear|failed|sad|hate|dying|nervous|worried|angry|terrible|omg|dead|delayed"
    r"|cancelled|late|awful)\b",
    re.IGNORECASE,
)
FILLERS = ["well", "hm", "oh", "ehm", "hmm"]

SCENARIOS = """
# dinner: dish=dish, place=venue, day=day, t1=time, t2=time
A: <hi> {B}, [fancy|how about|are you up for] dinner [on ]{day}? [I'm craving|I really want|I could kill for some]
  {dish}
> {A} [asks {B} to dinner|suggests a dinner with {B}] on {day}, because {A.he} [would like to eat|wants to have]
  {dish}.
B: [<yes>!|Ooh yes,|I'd love to,] [where|where do you want to go|any place in mind]?
> {B} [agrees|likes the idea] and [asks|wants to know] where [they will go|to go].
A: {place}? [They do the best {dish}|Everybody says it's good|It's not too expensive]
> {A} [names|proposes] {place}.
~
-- later
B: <great>. [What time|When]? [I could do|I can be there at] {t1}
> {B} [could come|would be free] at {t1}.
A: [Can we make it|Rather|Better] {t2}? <busy>
> {A} [would prefer|asks for] {t2} since {A.he} [is busy before that|has something to do first].
B: [Fine|<yes>], {t2} [works|is fine|it is]. [I'll book a table|I'll call them]
> {B} [accepts|is fine with that] and [will book a table|promises to call the restaurant].
= {A} and {B} are [having|going to have] dinner at {place} on {day} at {t2}. {B} will book a table.
= {A} and {B} will eat {dish} at {place} on {day} at {t2}.
= {A} [invites|asks] {B} to dinner on {day}. They will meet at {place} at {t2}, [and {B} books a table|not at {t1}].
-- declined
B: [Oh wait|Hmm, wait|Ah no], {day}? [I can't|That's no good], <busy>
> {B} [realises|remembers] that {B.he} [cannot come|is busy] on {day}.
A: [Pity|Oh, too bad|Aww]. [Next week then|Another time]?
> {A} [is sorry|is disappointed] and suggests [next week|another time].
B: [Definitely|Yes please|<yes>], [I'll let you know|I'll write when I know my plans]
> {B} [promises|agrees] to [let {A} know|write again].
= {A} [asks|invites] {B} to dinner at {place} on {day}, but {B} [is busy|can't come]. They [put it off|will do it
  another time].
= {B} can't have dinner with {A} on {day}. They will [try again|go to {place}] next week.
-- joined
C: [Did someone say|Wait, are you talking about] {dish}? [Can I come|Count me in|I want to come too]!
> {C} [reads the word|hears about the] {dish} and [wants to|asks to] come too.
A: [Of course|<yes>], [the more the merrier|come along]! {place}, {t2}
> {A} [is happy to take {C} along|says {C} can come] and says they meet at {t2}.
B: [See you both there|Can't wait|Great, table for three then]
> {B} [looks forward to it|is glad].
= {A}, {B} and {C} are [having dinner|going out for {dish}] at {place} on {day} at {t2}.
= {A} and {B} plan to eat {dish} at {place} on {day} at {t2}. {C} will [join them|come too].

# lost thing: item=lost, place=venue, spot=spot, day=day
A: [Has anyone seen|Have you seen|Did you by any chance see] my {item}? [I can't find it anywhere|It's gone|I'm going
  crazy]
> {A} [cannot find|is looking for] {A.his} {item}.
B: [When did you last have it|Where did you last see it|Did you check your bag]?
> {B} asks [when {A} last had it|where {A} last saw it].
A: [I had it|I think I still had it] at {place} on {day}
> {A} [had it|remembers having it] at {place} on {day}.
~
-- found at home
?A: [I've looked everywhere already|I even looked under the bed]
> {A} has looked everywhere.
B: [Hang on|Wait|Let me look]... [it's|there it is,] {spot}!
> {B} [finds|sees] it {spot}.
A: [Phew|OMG|Seriously]! <thanks>, [you saved me|I owe you one]
> {A} is [relieved|very happy] and thanks {B}.
= {A.poss} {item} is lost, but {B} [finds it|sees it] {spot}.
= {A} [is looking for|lost] {item.a} and had it last at {place}. It is {spot}.
= {B} finds {A.poss} {item} {spot}.
-- left behind
B: [Call them|Just ring them|Why don't you call them]! [Maybe somebody handed it in|They may have it]
> {B} [tells|advises] {A} to call {place}.
A: [Ok, calling|Good idea|Will do]... [they have it|it's there]! [I'll pick it up|I'm going there] [tomorrow|after
  work|tonight]
> {A} calls and [learns that it is there|hears that they have it].
B: <great> [lucky you|see]
> {B} is [glad|happy] for {A}.
= {A} left {item.a} at {place} on {day} and will [pick it up|go and get it].
= {A} lost {item.a}. [With {B.poss} advice|{B} says where to call, and] {A} [finds out|learns] that it is
  at {place}.
-- gone
A: [I called them, nothing|They don't have it|Nobody there has seen it]
> {A} [has asked there in vain|called, but they do not have it].
B: [<no>|Oh dear]. [Was it expensive|Was there anything important in it|Can you replace it]?
> {B} [is sorry|feels sorry] and asks whether it [was expensive|can be replaced].
A: It was [a present from|from] my {kin} :(
> {A} got it from {A.his} {kin}.
= {A} lost the {item}, a present from {A.poss} {kin}, at {place} on {day}.
= {A} is sad about the lost {item}, a present from {A.poss} {kin}.

# exam results: subject=subject, mark=mark, mark2=mark, day=day
A: [So|Sooo|{B}!!] how did the {subject} exam go? [Results are out|They posted the results]
> {A} asks {B} about the result of the {subject} exam.
-- passed
B: [I passed|Passed]!! {mark}
> {B} passed with {mark}.
A: [WOW|Congrats|Well done|You genius]! [I knew it|So proud of you]
> {A} congratulates {B}.
~
B: <thanks>! [And you|What about you|How about yours]?
> {B} asks how {A} did.
A: {mark2}, [I'm happy with it|could be worse|can't complain]
> {A} got {mark2} and is content.
?B: [We should celebrate|Drinks on {day}]!
> {B} wants to celebrate.
= {B} passed the {subject} exam with {mark} and {A} got {mark2}.
= {A} and {B} [both passed|talk about] the {subject} exam. {B} got {mark}, {A} {mark2}.
-- failed
B: [Don't ask|Badly|Terrible]... [I failed|I didn't pass]
> {B} [failed|did not pass].
A: [<no>|Oh no]. [What happened|But you studied so hard]?
> {A} is sorry and asks what happened.
B: [I ran out of time|I mixed up the questions|I had a complete blackout]. [I have to repeat it|The resit is] on {day}
> {B} [explains what went wrong|says what went wrong] and has to take it again on {day}.
A: [I'll help you|Let's study together|I can explain things to you]. I got {mark}, [so I know my stuff|it's not that
  hard]
> {A}, who got {mark}, offers to help.
B: [Really? <thanks>|You'd do that? <thanks>]
> {B} [accepts with thanks|is grateful].
= {B} failed the {subject} exam and must [repeat|retake] it on {day}. {A} will help.
= {B} didn't pass {subject}. {A} offers to study [together|with {B}] before the resit on {day}.
-- waiting
B: [Not yet for us|Ours come on {day}|Still waiting], [the professor is ill|they are so slow]
> {B} has no result yet.
A: [Really|Seriously]? [I got|Mine was] {mark}
> {A} got {mark}.
B: [Congrats|Nice one|Well done you]! [I'm so nervous|I have a bad feeling]
> {B} congratulates {A} and is nervous.
A: [You'll be fine|Don't worry|I'm sure you passed]
> {A} [calms {B.him}|is sure {B} has passed].
= {A} got {mark} in the {subject} exam. {B} is still waiting for the result.
= {B} doesn't know the {subject} result yet and is nervous. {A} got {mark}.

# broken at home: thing=appliance, firm=firm, day=day, hour=hour, price=fare
A: [Bad news|Great news, not|Ugh], the {thing} [is broken|broke down|stopped working|died] [again|this morning|last
  night]
> {A} [tells {B}|reports] that the {thing} [is broken|does not work].
B: [<no>|Not again|You're kidding]. [Did you call anybody|Did you tell the landlord|What now]?
> {B} asks [what {A} has done about it|whether {A} has called anybody].
-- repair
A: Yes, {firm} [will send somebody|can come|are coming] on {day} at {hour}
> {A} says that {firm} will [come|send somebody] on {day} at {hour}.
~
B: [I'm at work then|I can't be home then|I won't be there]. [Can you be home|Will you let them in]?
> {B} [cannot be at home|is away] then and asks {A} to be there.
A: [<yes>|Fine], [I'll work from home|I'll take the morning off|I'll stay home]
> {A} [will stay|promises to be] at home.
?B: <thanks>. [How much will it cost|Is it expensive]?
> {B} asks about the cost.
?A: About {price}
> It will be about {price}.
= The {thing} is broken. {firm} will come on {day} at {hour} and {A} will [stay home|let them in].
= {A} called {firm} because the {thing} [doesn't work|is broken]. {A} will be at home on {day} at {hour}.
-- new one
A: {firm} [was here|came already]. [It can't be repaired|Not worth repairing, they say]
> {A} [says that|explains that] {firm} cannot repair it.
B: [So we need|So we have to buy] a new one? [How much|What does that cost]?
> {B} asks [what a new one costs|how much a new one would be].
A: [There's one for|I saw one for] {price}. [Shall I order it|I could order it now]?
> {A} [has found|knows] one for {price} and [offers to|could] order it.
B: [Yes, do it|Ok, go ahead|Do it], [we'll split it|I'll pay half]
> {B} [agrees|wants {A} to order it] and will pay half.
= The {thing} can't be repaired. {A} will order a new one for {price} and {B} pays half.
= {A} and {B} will [buy|split the cost of] a new {thing} for {price}, because the old one is broken.
-- fixed it
A: [No|Not yet]. [I thought|Maybe] you could [have a look|take a look]?
> {A} [asks {B} to look at it|hopes that {B} can look at it].
B: [Have you tried turning it off and on|Did you check the fuse|Is it plugged in] lol
> {B} asks [about the fuse|whether {A} has tried the simple things].
A: [Let me see|Wait]... [omg it works|it's running again]! [I'm so stupid|How embarrassing]
> {A} tries and [it works again|the {thing} runs again].
B: [Haha|Lol], [that's {price} saved|you owe me {price}]
> {B} [laughs|jokes about it].
= {A} thought the {thing} was broken, but [with {B.poss} advice it works again|{B} helps to get it running].
= The {thing} [stopped working|didn't work]. {B} tells {A} what to check and it [runs|works] again.

# birthday present: P=person, gift=gift, gift2=gift, price=price, day=day
A: [It's {P.poss} birthday|{P} turns 30|{P} has {P.his} birthday] on {day}. [Any ideas for a present|What do we get
  {P.him}]?
> {A} [reminds the others of|mentions] {P.poss} birthday on {day} and asks for ideas for a present.
B: [How about|Maybe|What about] {gift.a}?
> {B} suggests {gift.a}.
-- other gift
A: [{P.he} already has one|I think {P.he} has one|Hmm, boring]. [I was thinking of|What about] {gift2.a}
> {A} [does not like that|thinks {P} has one already] and suggests {gift2.a}.
B: [Ooh, even better|Good one|{P.he} will love it]! [How much|What does it cost]?
> {B} [likes that better|agrees] and asks for the price.
A: {price}, [so half each|we share]
> It costs {price} and they will share it.
~
?B: [Who buys it|Will you get it]?
> {B} asks who will buy it.
A: I'll [get it|buy it|order it] [tomorrow|today|this afternoon]
> {A} will buy it.
= {A} and {B} will give {P} {gift2.a} as a birthday present on {day}. {A} will buy it.
= {A} will buy {gift2.a} for {P.poss} birthday. It costs {price} and {B} pays half.
= {A} and {B} [choose|decide on] {gift2.a}, not {gift.a}, as a present for {P}.
-- agreed
A: [Great idea|Yes|Perfect]! {P.he} [needs one|wanted one for ages|told me about that]
> {A} likes the idea.
B: [I can get it in town|I'll order it|I know a shop]. [It's|Around] {price}
> {B} can get it for {price}.
~
A: [I'll bake a cake then|I'll do the card|And I'll write the card]
> {A} will [make a cake|take care of the card].
= {A} and {B} want to give {P} {gift.a} as a birthday present on {day}. {B} will get it for {price}.
= {B} buys {gift.a} for {P}, whose birthday is on {day}.
-- three share
C: [Can I chip in|I'd like to join|Can I share it with you]? [I have no ideas|I'm broke]
> {C} [would like to share the present|wants to join them].
A: [<yes>|Sure {C}]. {gift.a} for {price}, [split three ways|by three]
> {A} agrees; {gift.a} for {price} is split between the three.
B: [Deal|Perfect], I'll [order|buy] it
> {B} will buy it.
C: [I'll send you the money|I'll pay you back on {day}]
> {C} will send the money.
= {A}, {B} and {C} share {gift.a} for {P.poss} birthday on {day}. {B} will [buy|order] it.
= {B} will get {gift.a} for {P} and {A} and {C} will pay their part. It costs {price}.

# moving house: street=street, day=day, hour=hour, hour2=hour, thing=furniture, food=dish
A: [I'm finally moving|We got the flat|The move is] [on ]{day}! [Could you help|Can you give me a hand]?
> {A} [is moving|moves house] on {day} and asks for help.
B: [Congrats|Wow, finally|Nice]! [Where to|Where is it]?
> {B} congratulates {A} and asks where the new flat is.
A: {street}, [third floor, no lift|ground floor, luckily|with a balcony]
> The flat is in {street}.
-- helps later
B: [I can come|I'll be there] at {hour}
> {B} can come at {hour}.
A: [The van only comes|I only get the van] at {hour2}
> {A} [says|explains] that the van comes at {hour2}.
~
B: {hour2} then. [What about food|Will there be food] lol
> {B} will come then and asks about food.
A: [I'll make|I promise] {food} for everybody!
> {A} will make {food} for the helpers.
= {A} is moving to {street} on {day}. {B} will help at {hour2} [and {A} will make {food}|].
= {B} will come at {hour2} on {day} to help {A} move to {street}.
-- can't help
B: [I'd love to help but|I'm so sorry,] [I hurt my back|I'm away that day|I'm on call]
> {B} cannot help.
A: [No worries|Never mind|It's ok]
> {A} does not mind.
B: [But|You know what,] I have {thing.a} [I don't need|to give away]. [Do you want it|Could you use it]?
> {B} [offers {A} {thing.a}|has {thing.a} to give away].
A: [Yes please|I'd love it|Really]! [My place is so empty|I have no furniture yet]
> {A} [gladly takes it|would like to have it].
= {A} is moving to {street} on {day}. {B} can't help, but will give {A} {thing.a}.
= {B} can't help {A} move on {day}. {A} [gets|will take] {B.poss} {thing}.
-- two help
B: [Count me in|I'll help]! [I can carry the {thing}|But I won't carry the {thing} alone]
> {B} will help.
C: [I've got a van|I can drive the van|I could bring my brother's van], [when should I come|what time]?
> {C} has a van and asks when to come.
A: {hour} [please|would be great]. You two are [the best|heroes]
> {A} asks them to come at {hour}.
= {B} and {C} will help {A} move to {street} on {day} at {hour}. {C} [brings|has] a van.
= {A} moves to {street} on {day}. {B} and {C}, who has a van, come at {hour}.

# train delay: town=town, wait=minutes, wait2=minutes, t1=time, t2=time
A: [I'm stuck|Still sitting|Sitting] [in|at the station in] {town}, [the train is delayed|my train is late]
> {A} is stuck in {town} because the train is late.
B: [<no>|Again|Not again]. [How long|How late is it]?
> {B} asks how long it will take.
A: [They say|The board says] {wait}
> It is said to be {wait}.
-- fetch
B: [So you arrive|So you'll be here] at {t1}?
> {B} [guesses|thinks] that {A} will arrive at {t1}.
A: [Now they say|Update:] {wait2}... [more like|rather] {t2}
> {A} [hears|learns] that it is {wait2} and will be there at {t2}.
~
B: [I'll pick you up|I'll fetch you|I'll wait for you at the station] [then|with the car]
> {B} will pick {A} up.
A: <thanks> [you're an angel|I'm so tired]
> {A} thanks {B}.
= {A.poss} train from {town} is [late|delayed]. {B} will pick {A} up at {t2}.
= {A} is stuck in {town} and will arrive at {t2}. {B} will [wait|be] at the station.
-- start without
A: [Start without me|Don't wait for me|Please eat without me]. [I won't make it before|I'll be there around] {t2}
> {A} will be there around {t2} and tells {B} not to wait.
B: [Ok|All right], [we'll keep you some {dish}|we'll save you a plate]
> {B} will keep some food.
A: [You're great|Thx]. [I hate this line|Never again by train]
> {A} is annoyed about the train.
= {A.poss} train is stuck in {town} and won't be there before {t2}. {B} will [start|eat] without {A}.
= {A} is late because of the train. {B} should not wait and will keep {A} some food.
-- cancelled
A: [Great, now it's cancelled|And cancelled. I can't believe it]
> Now the train is cancelled.
B: [Is there a bus|Take a bus|Any bus]?
> {B} asks about a bus.
A: [Not until tomorrow|The last one is gone]. [I'll stay|I'll sleep] at {P.poss} [place|]
> There is no bus, so {A} will stay with {P}.
B: [Ok, say hi to {P.him}|Good that {P} lives there]. [See you tomorrow|Safe trip tomorrow]
> {B} is glad about that.
= {A.poss} train from {town} is cancelled, so {A} will stay at {P.poss} [place|].
= {A} can't get home from {town} [today|tonight] and will sleep at {P.poss} place.

# job interview: job=job, firm=company, day=day, hour=hour, wear=garment
A: [Guess what|Big news]! [I have|I got] an interview at {firm} [on ]{day}
> {A} has an interview at {firm} on {day}.
B: [Wow|Amazing|Yesss]! [What is it for|As what|Which job]?
> {B} asks what the job is.
A: {job.a}. [I'm so nervous|My hands are shaking|I want it so much]
> It is for a job as {job.a}, and {A} is nervous.
-- clothes
B: [You'll be great|They'll love you]. [What will you wear|Do you know what to wear]?
> {B} is sure {A} will do well and asks about the clothes.
A: [No idea|Nothing fits me|That's the problem]!
> {A} does not know.
~
B: [You can have|I can lend you|Take] my {wear}. [It always brings luck|It looks serious]
> {B} offers {A} {B.his} {wear}.
A: [Really|Would you]? <thanks>! [I'll come by tonight|I'll fetch it on my way]
> {A} accepts and will come to get it.
= {A} has an interview as {job.a} at {firm} on {day}. {B} will lend {A} {wear.a}.
= {B} lends {A} {wear.a} for an interview at {firm} on {day}.
-- practise
B: [Do you want to practise|We could practise the questions|Shall I ask you some questions]?
> {B} offers to practise with {A}.
A: [Oh yes|Please|That would help a lot]! [When are you free|Tonight]?
> {A} would like that.
B: [Come over|Call me] at {hour} tomorrow
> They will do it at {hour} tomorrow.
A: [Will do|Great]. <thanks>
> {A} thanks {B}.
= {A} has a job interview at {firm} on {day}. {B} will practise with {A} tomorrow at {hour}.
= {A} is nervous about an interview as {job.a}. {B} will help {A} [to practise|to prepare] tomorrow.
-- clash
B: [But wait|Hold on], {day}? [Isn't that|That's] {P.poss} [graduation|farewell party]!
> {B} points out that {P} has a party on that day.
A: [Omg you're right|Damn, I forgot]. [I'll ask them|Let me ask] for another day
> {A} had forgotten and will ask for another day.
B: [And|So]? [What did they say|Did they answer]?
> {B} asks for the answer.
A: [They moved it to|It's now at] {hour} [in the morning|], [so I can do both|no problem]!
> The interview is now at {hour}, so {A} can do both.
= {A} has an interview at {firm} on {day}, the day of {P.poss} party. It is at {hour} now, so {A} can do both.
= {A.poss} interview as {job.a} was on the day of {P.poss} party. {firm} moved it to {hour}.

# sick pet: pet=pet, N=petname, ill=ailment, day=day, hour=hour
A: [I'm worried about|Something is wrong with] {N}. [My {pet}|The poor thing|My poor {pet}] [hasn't eaten|won't eat]
  since {day}
> {A} is worried about {A.his} {pet} {N}, who has not eaten since {day}.
B: [Poor little thing|<no>|Oh no, poor {N}]. [Did you call the vet|Have you been to the vet]?
> {B} [feels sorry for|pities] the {pet} and asks about the vet.
-- vet later
A: [Yes|Just did], [they can see us|we can come] at {hour}
> They can see the vet at {hour}.
B: [Shall I drive you|Do you need a lift|I could come with you]?
> {B} offers to [drive|come along].
A: [Would you|That would be great]? [I can't carry the basket alone|The bus is awful with {pet.a}]
> {A} gladly accepts.
~
B: [I'll be there|I'll pick you up] [half an hour before|a bit earlier]
> {B} will pick {A} up a bit earlier.
= {A.poss} {pet} {N} is ill. {B} will drive {A} to the vet at {hour}.
= {A} is worried about {N}, [the {pet}|who doesn't eat], and is going to the vet at {hour}. {B} will drive.
-- result
A: [We just came back|Yes, we were there today]. [It's|He says it's] {ill.a}
> The vet found {ill.a}.
B: [Is it serious|Will {N} be ok|Is that bad]?
> {B} asks whether it is serious.
A: [No, luckily|Not really]. [Pills for a week|Some medicine] and [then we go back|another check] on {day}
> It is not serious; {N} needs medicine and has another check on {day}.
B: [Phew|Good]. [Give {N} a hug|A cuddle from me]
> {B} is relieved.
= {A.poss} {pet} {N} has {ill.a}. It isn't serious and {N} [gets|needs] medicine.
= {A} took {N} to the vet because of {ill.a}. They [go back|have another check] on {day}.
-- false alarm
A: [Not yet|No], [it's closed|they're closed today]
> {A} has not, because it is closed.
B: [Did you give {N} something new|Did you change the food]?
> {B} asks about the food.
A: [Hmm, yes|Oh! Yes], [a new brand|the cheap one] from {shop}
> {A} gave {N} a new one from {shop}.
B: [There you go|That's it|So that's why]. [Mine hated it too|Mine never touched it]
> {B} thinks that is the reason.
A: [You were right|Just gave the old one], {N} is [eating like crazy|eating again] haha
> With the old food {N} eats again.
= {A.poss} {pet} {N} didn't eat because of the new food from {shop}. Now {N} is eating again.
= {A} was worried about {N}, but {B} guessed that it was the new food from {shop}.

# borrowed thing: loan=loan, day=day, day2=day, P=person
A: <hi> {B}, [do you still have|have you still got] my {loan}?
> {A} asks {B} whether {B.he} still has {A.his} {loan}.
-- gives back
B: [Yes, sorry|Oops, yes|Yeah], I [forgot to|meant to] bring it back. [Do you need it|Is it urgent]?
> {B} still has it and [forgot to|meant to] give it back.
A: [I need it|Yes, for something] on {day}
> {A} needs it on {day}.
?B: [Can it wait till|Could I keep it until] {day2}?
> {B} asks to keep it until {day2}.
?A: [Sorry, no|Not really|No way]
> {A} says no.
~
B: [Ok|Fine], I'll [drop it off|bring it over|leave it at your door] [the day before|tonight|tomorrow]
> {B} will bring it [back|over].
A: <great>, <thanks>
> {A} thanks {B}.
= {B} still has {A.poss} {loan} and will bring it back, because {A} needs it on {day}.
= {A} needs the {loan} back [for|on] {day}. {B} will [bring it over|return it].
-- passed on
B: [No|Hmm no], I [gave|lent|passed] it to {P} [on {day}|last week]. [I thought you knew|Didn't I tell you]
> {B} gave it to {P}.
A: [You did what|Seriously]?? [It's my {kin}'s|It isn't even mine]
> {A} is angry because it belongs to {A.his} {kin}.
B: [I'm so sorry|Sorry!!] I'll [get it back|ask {P.him}] [today|right now]
> {B} is sorry and will get it back from {P}.
A: [Please do|You'd better]. [I need it|It must be back] on {day2}
> {A} needs it on {day2}.
= {B} gave {A.poss} {loan} to {P}. {A} is angry and needs it back on {day2}.
= {B} must get the {loan} back from {P} by {day2}. It belongs to {A.poss} {kin}.
-- broken
B: [About that|I was going to tell you|Don't be mad]... [it broke|I broke it] [yesterday|on {day}]
> {B} admits that it broke.
A: [What|Oh no|Noooo]! [How|What happened]?
> {A} asks how.
B: [It fell off the car|I dropped it|My {kin} sat on it]. [I'll buy you a new one|I'll pay for it], promise
> {B} explains it and promises to pay for a new one.
A: [Ok|All right], [accidents happen|but a good one please]
> {A} accepts that.
= {B} broke {A.poss} {loan} and will [buy {A} a new one|pay for it].
= {A} wants the {loan} back, but it is broken. {B} [promises to buy|will pay for] a new one.
# training: sport=sport, place=ground, day=day, t1=time, t2=time
A: [Are you coming to|Will you be at|See you at] {sport} [training|practice] [on ]{day}?
> {A} asks whether {B} is coming to {sport} training on {day}.
-- new time
B: [Sure|Of course], {t1} as [always|usual]?
> {B} [wants to come|will be there] and thinks it is at {t1}.
A: [No|Nope], [coach moved it|they changed it] to {t2}, [and|but] it's at {place} [this time|]
> {A} explains that it was moved to {t2} and is at {place}.
B: [Good to know|Ah, nobody tells me anything|Glad I asked]
> {B} had not known that.
~
?A: [Can you bring|Don't forget] the [balls|bibs|water]
> {A} asks {B} to bring something.
?B: [Will do|Already in my bag]
= {sport} training on {day} is at {place} at {t2}, [not at {t1}|instead of {t1}]. {B} will come.
= {A} tells {B} that the {sport} training was moved to {t2} and takes place at {place}.
-- injured
B: [I can't|Not this time], I [twisted my ankle|hurt my knee|pulled a muscle] [playing|at] {place}
> {B} cannot because {B.he} hurt {B.himself} at {place}.
A: [Ouch|Oh no]! [For how long|How long will it take]?
> {A} asks for how long.
B: [The doctor says|They told me] {weeks}
> {B} must rest for {weeks}.
A: [So you'll miss|Then you miss] the [game|match] against {team} :(
> {B} will miss the game against {team}.
B: [I know|Yes]. [Win it for me|I'll come and cheer]
> {B} [wants them to win|will come and cheer].
= {B} is injured, can't play {sport} for {weeks} and will miss the game against {team}.
= {B} got hurt at {place} and can't come to {sport} training or play against {team}.
-- quits
B: [Actually|To be honest] I want to [stop|quit]. [I've no time any more|It's no fun any more]
> {B} wants to stop.
A: [What|Seriously]?? [We need you|You're our best player] against {team}
> {A} is shocked, since they need {B} against {team}.
B: [Ok|Fine], [one last game|I'll play that one]. [Then I'm done|But that's it]
> {B} will play this last game.
A: [Deal|We'll see about that] haha
> {A} accepts.
= {B} wants to quit {sport}, but will play a last game against {team}.
= {A} [persuades|gets] {B}, who wants to stop {sport}, to play against {team}.

# concert: band=band, town=town, day=day, price=price, P=person
A: {band} [are playing|play] in {town} [on ]{day}!! [Are you in|Shall we go|Do you want to go]?
> {A} [tells {B}|says] that {band} play in {town} on {day} and wants to go.
-- both go
B: [OMG yes|Yesss|I love them]! [How much are the tickets|What's the price]?
> {B} wants to go and asks for the price.
A: {price} [each|a ticket]. [Almost sold out|Not many left]
> A ticket is {price}.
~
B: [Get me one|Buy one for me|Take one for me], [I'll pay you back|I'll send you the money]
> {B} asks {A} to buy one for {B.him}.
A: [Done|Got them|Bought]! [Row 12|Standing|Best day ever]
> {A} has bought them.
= {A} bought tickets for {band} in {town} on {day}. {B} will pay {A} back.
= {A} and {B} are going to the {band} concert in {town} on {day}. The tickets cost {price}.
-- too expensive
B: [What do they cost|How much]?
> {B} asks for the price.
A: {price}
> It is {price}.
B: [Too much for me|I can't afford that|That's crazy], [I'm saving for|I need the money for] a new {device}
> That is too much for {B}, who is saving for a new {device}.
A: [Pity|Aww]. [Then I'll ask|I'll take] {P}
> {A} will ask {P}.
?B: [Have fun|Take pictures]!
= {B} won't go to the {band} concert because {price} is too much. {A} will ask {P}.
= {A} wants to see {band} in {town}. {B} is saving for {device.a}, so {A} will go with {P}.
-- won tickets
B: [You won't believe it|Haha, listen], [I won|I've just won] two tickets [on the radio|in a quiz]!
> {B} has won two tickets.
A: [NO WAY|You're kidding]! [And who|Who] are you taking?
> {A} asks who {B} will take.
B: [You, of course|Well, guess|You, silly]. [You drive|If you drive]
> {B} will take {A}, who has to drive.
A: [I'd drive you to the moon|Yes yes yes|Deal]!!
> {A} is [overjoyed|happy to drive].
= {B} won two tickets for {band} in {town} and takes {A}, who will drive.
= {A} will drive {B} to {town} on {day} to see {band}. {B} won the tickets.

# recipe: place=venue, dish=dish, item=ingredient, item2=ingredient, n=minutes, P=person
A: [Can you send me|Could I have|Do you have] [the|your] recipe for {dish}? [{P} is coming tonight|I want to surprise
  {P}|I'm cooking for {P}]
> {A} asks for the recipe for {dish} because {A.he} is cooking for {P}.
-- replace
B: [Sure|Here you go|Easy]. [The most important thing is|You need] {item} [and|,] onions, [then|and] {n} in the oven
> {B} explains that it needs {item} and {n} in the oven.
A: [I have no|I don't have any|We're out of] {item}. [Does it work without|What else can I take]?
> {A} has no {item} and asks what else {A.he} can take.
B: [Take|Use|Try] {item2}, [tastes the same|even better]
> {B} tells {A.him} to take {item2}.
~
A: <great>. I'll [tell you how it went|send you a picture]
> {A} will report.
= {B} gives {A} a recipe for {dish}. {A} has no {item} and should [use|take] {item2}.
= {A} wants to cook {dish} for {P}. {B} tells {A} to use {item2}[ instead of|, not] {item}.
-- allergic
B: [Careful|Wait], {P} [is allergic to|can't eat] {item}. [It's full of it|That's in there]
> {B} warns {A} that {P} cannot eat {item}.
A: [Oh no|I had no idea|Good that you say it]. [What can I make|What should I cook] then?
> {A} had not known and asks what to make.
B: {dish2}! [Everyone likes it|{P} loves it|You can't go wrong]
> {B} suggests {dish2}.
A: [Ok|Perfect], {dish2} it is
> {A} will make {dish2}.
= {A} wanted to make {dish} for {P}, who can't eat {item}, so it will be {dish2}.
= {P} is allergic to {item}, so {B} advises {A} to cook {dish2} [instead|].
-- burnt
B: [It's on the fridge|I sent it last year|Look in the blue book]! [Flour, eggs, {item}|Don't forget the {item}]
> {B} tells {A} where it is and that it needs {item}.
A: [An hour later|Update]: [it's black|I burnt it|the kitchen is full of smoke]
> {A} burns the food.
B: [Haha|LOL|Oh dear], [order something|call {place}]. {P} [won't mind|will laugh]
> {B} laughs and tells {A.him} to order from {place}.
A: [Yep|Done], {place} [brings it|is on the way]
> {A} orders from {place}.
= {A} burnt the {dish} for {P} and orders food from {place}.
= {A} tried to cook {dish} for {P} but it is burnt, so {A} orders at {place}.

# parcel: item=goods, shop=shop, P=person, hour=hour, day=day
A: [Has my {item} arrived|Did my {item} arrive|Has my {item} from {shop} come]?
> {A} asks whether {A.his} {item} from {shop} has come.
-- neighbour
B: [There was a note|They left a card]: [it's with|parcel is with] {P} [next door|downstairs]
> {B} found a note that it is with {P}.
A: [Can you get it|Could you fetch it]? [I need it|It's for] [tonight|tomorrow]
> {A} asks {B} to get it.
B: [Nobody opens|{P} isn't in]. I'll try again at {hour}
> {P} is not in and {B} will try again at {hour}.
A: <thanks>
> {A} thanks {B.him}.
= {A.poss} {item} is with {P}. {B} will try to get it at {hour}.
= {B} will fetch {A.poss} parcel from {shop} at {hour}. {P} has it.
-- wrong thing
B: [Yes|Yep], [a big box|it's in the hall]. [Shall I open it|Can I open it]?
> {B} says yes and offers to open it.
A: [Yes please|Go on|Open it]
> {A} agrees.
B: [Hm|Errr]... [that's|it's] {item2.a} lol
> {B} finds {item2.a}.
A: [What|Are you serious]? I ordered {item.a}! [I'm sending it back|I'll complain]
> {A} had ordered {item.a} and will send it back.
~
?B: [The form is in the box|I can take it to the post office on {day}]
= {shop} sent {A} {item2.a} instead of {item.a}. {A} will [send it back|complain].
= {A} ordered {item.a} from {shop} but got {item2.a}.
-- not yet
B: [No|Nothing yet|Nope]. [When should it come|When did you order it]?
> {B} says no and asks when it was ordered.
A: [On ]{day}. [I'll call|I'm calling] {shop}
> It was ordered on {day} and {A} will call {shop}.
B: [And|Well]?
> {B} asks for news.
A: [They forgot it|Lost on the way]... [they send a new one|new one is coming], [and|plus] {price} back
> They send a new one and give back {price}.
= {A.poss} {item} hasn't come. {shop} will send a new one and [give|pay] {A} {price} back.
= {shop} [lost|forgot] {A.poss} {item}, ordered on {day}. They send a new one.

# wedding: P=person, Q=person, town=town, month=month, gift=gift, wear=garment
A: [Did you hear|Have you heard]? {P} and {Q} are [getting married|engaged]!
> {A} has news: {P} and {Q} are getting married.
B: [Nooo|Really|WOW]! [When|When and where]?
> {B} is surprised and asks for details.
A: In {month}, in {town}. [We're all invited|Invitations are on the way]
> The wedding is in {town} in {month}.
-- outfit
B: [I have nothing to wear|What do I wear|I need something to wear]
> {B} has nothing to wear.
A: [You've got that|What about your|Take your] {wear}!
> {A} suggests the {wear}.
B: [Too small|It doesn't fit any more|I spilled wine on it]. [Come shopping with me|Let's go shopping] [on ]{day}?
> {B} cannot wear that and asks {A} to come shopping on {day}.
A: [With pleasure|I'd love to|Yay yes]
> {A} agrees.
= {P} and {Q} are getting married in {town} in {month}. {A} and {B} will go shopping on {day}.
= {B} needs something to wear for {P.poss} wedding, so {A} and {B} go shopping on {day}.
-- not coming
B: [Hm|Oh no], {month}? [I'm in|I'll be in] {town2} then, [for work|for the whole month]
> {B} will be in {town2} at that time.
A: [You must come|You can't miss it]! {P} [would be so sad|will never forgive you]
> {A} thinks {P} would be sad.
B: [I'll see|I'll ask my boss|Let me check the flights]. [If not, I'll send|At least I'll send] {gift.a}
> {B} will see what {B.he} can do, or send {gift.a}.
= {P} will marry {Q} in {town} in {month}. {B} is in {town2} then and may not come.
= {B} might miss {P.poss} wedding for {town2}, and would send {gift.a}.
-- speech
B: [So happy for them|How lovely|At last]. [Who does the music|Can I help]?
> {B} is happy and offers help.
A: {P} [asked|wants] me to [give a speech|make a speech]. [I hate that|I'm dying]
> {P} wants {A} to make a speech.
B: [I'll write it|We'll write it together], [I know all the stories|easy]. And [I'm giving them|I'll get them]
  {gift.a}
> {B} will help to write it and give them {gift.a}.
A: [You're my hero|Saved]
> {A} is relieved.
= {A} has to make a speech at the wedding of {P} and {Q} in {month}. {B} will help.
= {P} and {Q} are getting married in {town}. {B} helps {A} with the speech and will give {gift.a}.

# chores: place=venue, chore=chore, chore2=chore, P=person, day=day, food=dish
A: [Whose turn is it|Who is] [to do|doing] the {chore} this week? [The flat looks awful|It's your turn I think]
> {A} asks whose turn it is to do the {chore}.
-- swap
B: [Mine|Me], but [I'm ill|I'm away until {day}|I have no time]. [Can we swap|Would you swap]?
> It is {B.poss} turn, but {B} asks to swap.
A: [Ok|Fine], [I'll do it|I do that] [today|now], you do the {chore2} on {day}
> {A} will do it now if {B} does the {chore2} on {day}.
B: [Deal|That's fair]. [I hate|Even though I hate] the {chore2} lol
> {B} agrees.
= {A} and {B} swap: {A} does the {chore} and {B} the {chore2} on {day}.
= {B} asks {A} to swap. {A} will do the {chore} and {B} will do the {chore2} [on {day}|].
-- quarrel
B: [Not mine|I did it last time|I always do it]! [It's {P.poss} turn|Ask {P}]
> {B} says it is {P.poss} turn.
A: {P} [never does anything|hasn't done a thing since {month}]. [I'm fed up|It's unfair]
> {A} is angry with {P}, who never does anything.
B: [Let's talk to {P.him}|We should talk] on {day}, [all of us|calmly], over {food}
> {B} suggests a talk with {P} on {day} over {food}.
A: [Ok|Good idea]. [You start|I'll make a list]
> {A} agrees.
= {A} and {B} are annoyed because {P} doesn't [help|do the {chore}]. They will talk to {P} on {day}.
= {P} never does the {chore}. {A} and {B} want to talk to {P} on {day}.
-- third does it
B: [No idea|Not me], [look at the plan|what does the list say]
> {B} does not know.
C: [It's me|Mine, sorry]! I [forgot|was at {place}]. [I'll do it tonight|Doing it tonight]
> {C} says it is {C.his} turn and will do it tonight.
A: [Thanks {C}|Great]. [And|Then] I'll take the {chore2}
> {A} will take the {chore2}.
B: [And I cook|I'll make] {food}
> {B} will make {food}.
= {C} forgot the {chore} and will do it tonight. {A} does the {chore2} and {B} cooks {food}.
= {C} will do the {chore} tonight, {A} the {chore2}, and {B} will make {food}.

# doctor: item=ingredient, ache=ache, doc=doctor, day=day, hour=hour, day2=day
A: [How are you|Feeling better|Are you ok]? [You looked pale|You were so quiet yesterday]
> {A} asks {B} how {B.he} is.
B: [Not really|Not great|So so]. [I have|I've had] {ache.a} [since {day}|]
> {B} has {ache.a}.
-- goes
A: [You need to see|You should see|Go to] {doc.a}!
> {A} wants {B.him} to see {doc.a}.
B: [I called|I tried]. [The first appointment is|They only have time] on {day2} at {hour}
> {B} has an appointment on {day2} at {hour}.
~
A: [Shall I come with you|Do you want company]?
> {A} offers to come along.
B: [That would be nice|Yes please|Would you]? [I'm a bit scared|I hate going alone]
> {B} gladly accepts.
= {B} has {ache.a} and will see {doc.a} on {day2} at {hour}. {A} will come along.
= {A} will go with {B} to {doc.a} on {day2} [because of {ache.a}|].
-- home remedy
A: [Try|You need|Drink tea with] {item}. [My {kin} swears by it|Always helps my {kin}]
> {A} recommends {item}, like {A.his} {kin}.
B: [Really|Does that work|Sounds horrible]? [I'll try|Ok, I'll try it]
> {B} will try it.
A: [And stay in bed|And don't go to work]! [Shall I tell|I'll tell] {P}?
> {A} wants {B} to rest and will tell {P}.
B: [Yes please|<thanks>]. [I'll be back|Tell {P.him} I'll be back] on {day2}
> {B} will be back on {day2}.
= {B} has {ache.a}. {A} recommends {item} and will tell {P} that {B} is back on {day2}.
= {B} is ill and will try {item} [against|for] {ache.a}. {A} will tell {P}.
-- cancels
A: [Oh no|Poor you]. [So no|What about] {sport} [on {day2}|with {P}]?
> {A} asks about {sport} on {day2}.
B: [I can't|No way]. the {doc} [told me to rest for|said no sport for] {weeks}
> {B} cannot, because the {doc} told {B.him} to rest for {weeks}.
A: [Ok|Right]. [I'll ask|Then I'll go with] {P}. [Get well soon|Rest and get well]!
> {A} will ask {P} and wishes {B} well.
= {B} has {ache.a} and must rest for {weeks}. {A} will ask {P} to come to {sport}.
= {B} can't play {sport} because of {ache.a}. {A} goes with {P}.

# film: film=film, film2=film, place=cinema, day=day, t1=time, t2=time
A: [Cinema|Movie night|Let's go to the cinema] [on ]{day}? {film} [is on|is finally out|has started]
> {A} suggests seeing {film} at the cinema on {day}.
-- other film
B: [I've seen it|Saw it last week], [boring|so long|don't waste your money]. [What about|Rather] {film2}?
> {B} has seen it and suggests {film2}.
A: [Ok|Fine|Why not]. [When|What time]?
> {A} agrees and asks when.
B: {t1} or {t2} at {place}
> {B} says it is on at {t1} or {t2} at {place}.
A: [The late one|{t2}], [I must feed the cat|I finish late]
> {A} wants the late one.
~
?B: [I'll get the tickets|Popcorn is on you]
= {A} and {B} will see {film2} at {place} on {day} at {t2}.
= {B} has seen {film}, so {A} and {B} are going to {film2} on {day} at {t2}.
-- alone
B: [Horror is not for me|Not my thing|I fell asleep in the first part]. [Ask {P}|Go with {P}]
> {B} does not like that and says {A} should ask {P}.
A: {P} [is away|can't]. [Come on|Please], [my treat|I pay]!
> {P} cannot come, so {A} offers to pay.
B: [Hmm ok|If you pay|You win]. {t1} at {place}?
> {B} gives in and asks for {t1} at {place}.
A: [Yes|Yay]!!
> {A} is happy.
= {A} persuades {B} to come and see {film} at {place} on {day}. {A} pays.
= {B} doesn't like {film} but will go on {day} at {t1} because {A} pays.
-- at home
B: [The cinema is too expensive|I'm so tired|I have a cold]. [Can't we watch|Let's watch] [it|something] at [home|my
  place]?
> {B} would rather watch something at home.
A: [Also good|Ok]. [You have|We could watch] {film2}, right?
> {A} agrees and asks for {film2}.
B: [Yes|Yep]! [Come at|Be here at] {t2}, [bring snacks|I make {dish}]
> {A} should come at {t2}.
= {A} and {B} [stay|will stay] at home and watch {film2} at {t2}.
= {A} wanted to see {film} at the cinema, but will watch {film2} at {B.poss} place on {day}.

# holiday: town=resort, town2=resort, month=month, price=fare, weeks=weeks, P=person
A: [We have to book|Let's book our holiday|Where do we go this year]! [I found a house|There's an offer] in {town}
  for {price}
> {A} wants to book a holiday and has found an offer in {town} for {price}.
-- other place
B: [Again|Hmm, {town}]? [Too hot for me|It was full of tourists|There's nothing to do]. I'd [rather go|prefer to go]
  to {town2}
> {B} does not like that and would rather go to {town2}.
A: [Ok|Why not|You know what, good idea]. [In|When? In] {month}?
> {A} agrees and asks about {month}.
B: [Yes|Perfect], {weeks}. [I'll look for a flat|I'll look for flights]
> {B} is fine with that, for {weeks}, and will look for something.
= {A} and {B} are going to {town2} for {weeks} in {month}, not to {town}.
= {A} suggests a holiday in {town}, but {B} prefers {town2}. They will go in {month} for {weeks}.
-- booked
B: [Wow|That's cheap]! [For how long|How many weeks]?
> {B} finds it cheap and asks for how long.
A: {weeks} in {month}. [Shall I book|Booking now]?
> It is for {weeks} in {month}.
~
B: [Book it|Yes, before it's gone]! [Can {P} come|Is there room for {P}]?
> {B} wants it and asks whether {P} can come.
A: [Yes|Sure], [there are three beds|the sofa is free]
> {A} says there is room.
= {A} [books|will book] a holiday in {town} for {weeks} in {month}. {P} will come too.
= {A}, {B} and {P} go to {town} in {month}. It costs {price}.
-- no money
B: [I can't|Not this year], [I have no money|I lost my job|the car ate my savings]
> {B} cannot because of the money.
A: [Oh no|Aww]. [What will you do|So what are you doing] [then|in {month}]?
> {A} asks what {B} will do.
B: [Stay at home|Work], [and visit|maybe visit] {P} in {town2}
> {B} may visit {P} in {town2}.
A: [Sounds nice too|Not bad]. [I'll ask my {kin}|I'll go with my {kin}]
> {A} will ask {A.his} {kin}.
= {B} has no money for a holiday in {town} and [may|might] visit {P} in {town2}.
= {A.poss} {kin} will be asked to come to {town}, because {B} can't afford it.

# lift to the airport: town=town, day=day, hour=hour, hour2=hour, P=person
A: [Could you drive me|Can you take me|Any chance of a lift] to the airport [on ]{day}? [I'm flying to|My flight to]
  {town} [!|]
> {A} asks for a lift to the airport on {day}, as {A.he} is flying to {town}.
-- lift
B: [Sure|I think so]. [When is the flight|What time]?
> {B} asks for the time.
A: {hour2}, so [leave|we should leave] at {hour}
> {A} wants to leave at {hour}, because the flight is at {hour2}.
B: [That early|Phew, ok|Fine]! I'll [be outside|ring the bell|pick you up]
> {B} will pick {A} up.
~
A: [I'll bring you chocolate|I'll bring you something nice]!
> {A} will bring {B} something.
= {B} will drive {A} to the airport on {day} at {hour}. {A} is flying to {town}.
= {A} is flying to {town} on {day} at {hour2}. {B} picks {A} up at {hour}.
-- someone else
B: [My car is|The car's] [at the garage|broken]. [But {P}|I think {P}] [works there|is going there] [on ]{day}, [ask
  {P.him}|shall I ask]?
> {B.poss} car is not there, but {P} could take {A}.
A: [Good idea|Please do|Would you ask]?
> {A} likes the idea.
B: [Done|Asked]. {P} [takes you|can take you], [be ready|be downstairs] at {hour}
> {P} will take {A} at {hour}.
A: <thanks>! [I'll pay for the petrol|]
> {A} is grateful.
= {B.poss} car is broken, so {P} will take {A} to the airport on {day} at {hour}.
= {P} drives {A} to the airport at {hour}. {A} is flying to {town}.
-- bus
B: [I'm so sorry|Sorry], [I work|I'm teaching] [on {day}|that day]. [There's a bus|Take the bus] from {street}
> {B} has to work and mentions a bus from {street}.
A: [How often|When does it go]?
> {A} asks when it goes.
B: [The first is|One leaves] at {hour}. [It takes|Takes] {minutes}
> It goes at {hour} and takes {minutes}.
A: [That'll do|Ok, good|Cheaper than a taxi]. [Thx|Thanks anyway]
> {A} will take it.
= {B} can't drive {A} to the airport. {A} will take the bus from {street} at {hour}.
= {A} is flying to {town} on {day} and takes the {hour} bus from {street} because {B} works.

# homework: place=ground, subject=subject, topic=topic, day=day, P=person, n=number
A: [What was|Did you write down] the {subject} homework? [I was asleep|I wasn't there|I lost my notes]
> {A} asks {B} for the {subject} homework.
-- essay
B: [An essay|We have to write] on {topic}, {n} pages
> {B} tells {A} that it is an essay on {topic} of {n} pages.
A: [What|{n} pages|Omg]?! [For when|Until when]?
> {A} is shocked and asks for when.
B: [For ]{day}. [I've just started|I have one page so far]
> It is for {day}.
A: [Shall we do it together|Library]? [After school|Tomorrow]?
> {A} suggests doing it together.
B: [Yes|Good plan], [I'll bring my notes|I have a book on it]
> {B} agrees.
= {A} and {B} have to write {n} pages on {topic} for {day}. They will do it together.
= {B} tells {A} about the {subject} homework, an essay on {topic} for {day}.
-- copy
B: Page {n}. [Why|Didn't you do it]? [It's due tomorrow|We have it first thing tomorrow]
> {B} names page {n} and reminds {A} that it is due tomorrow.
A: [Can I copy yours|Would you send me yours|Let me copy]? [Please|Pretty please]
> {A} wants to copy it.
B: [No|Nope], [{P} noticed last time|we got caught last time]. [I'll explain it|Call me and I explain it]
> {B} refuses because {P} noticed last time, but will explain it.
A: [Ok|Fine]... [you're right|calling you]
> {A} accepts that.
= {A} wants to copy {B.poss} {subject} homework. {B} says no, but will explain it.
= {B} doesn't let {A} copy the {subject} homework as {P} noticed it last time.
-- none
B: [None|Nothing]! {P} [is ill|is off sick], [no {subject}|it's cancelled] until {day}
> {B} says there is none, because {P} is ill until {day}.
A: [YES|Best news ever|Woohoo]! [So what do we do|Are you free] this afternoon?
> {A} is happy and asks what to do.
B: [Let's play|We could play] {sport} at {place}
> {B} suggests {sport} at {place}.
A: [Coming|On my way|See you there]
> {A} agrees.
= There is no {subject} homework because {P} is ill. {A} and {B} will play {sport} at {place}.
= {A} and {B} have no {subject} until {day}, so they are going to play {sport}.
# broken device: device=device, place=venue, price=fare, firm=firm, day=day
A: [Bad day|What a day|You won't believe it], my {device} is [dead|broken]
> {A} writes that {A.his} {device} is broken.
B: [Again|What happened|How did you do that]?
> {B} asks what happened.
A: I [dropped it|spilled coffee on it|sat on it] at {place}. [The screen is black|It won't start]
> It happened at {place}.
-- repair
B: [Take it|Bring it] to {firm}, [they fixed mine|they're quick]
> {B} recommends {firm}.
A: [How much did you pay|Are they expensive]?
> {A} asks for the price.
B: {price}, [and it took two days|ready the same day]
> {B} paid {price}.
A: [Not bad|Ok, that's fine]. I'll go [there |]on {day}
> {A} will go there on {day}.
= {A.poss} {device} broke at {place}. {A} will take it to {firm} on {day}.
= {B} tells {A} to have the {device} repaired by {firm}. [It costs|It cost {B}] {price}.
-- lend
B: [I have an old one|My old one is in a drawer]. [Want it|Do you want it]?
> {B} has an old one and offers it.
A: [Does it still work|Really]? [Yes please|I'd take it]
> {A} would like it.
B: [It's slow, but yes|Sure]. [You can keep it|Keep it] until {day}
> {A} can keep it until {day}.
~
A: [I'll come round|Can I get it tonight]? <thanks>
> {A} will come to get it.
= {A.poss} {device} broke at {place}. {B} will lend {A} an old one until {day}.
= {B} lends {A} an old {device} [until {day}|], because {A.poss} is broken.
-- buys new
B: [Is there still a guarantee|Can they repair it]?
> {B} asks whether it can be repaired.
A: [No|Nope]. {firm} [wants|asked for] {price} [just to look at it|]. [I'll buy a new one|New one it is]
> {firm} asked for {price}, so {A} will buy a new one.
B: [There's a sale|They have offers] at {shop}
> {B} mentions a sale at {shop}.
A: [I'm on my way|Going there on {day}|Perfect timing]
> {A} will go there.
= {A.poss} {device} is broken. {A} will buy a new one at {shop}.
= {firm} wants {price} to repair {A.poss} {device}, so {A} is going to the sale at {shop}.

# group project: topic=topic, subject=subject, day=day, t1=time, place=venue
A: [Guys|Hi all], [who does what|how do we split the work] for the {subject} project? [It's about|Topic:] {topic}
> {A} asks the others how to share the work on the {subject} project about {topic}.
-- split
B: I'll [do|make] the [slides|poster]
> {B} will make the slides or the poster.
C: [And I|I can] [do the research|look for sources|read the articles]
> {C} will look for sources.
A: <great>, [then I write the text|so I'll write]. [When do we meet|Meeting]?
> {A} will write the text and asks when they meet.
~
B: {day}, {t1}, {place}?
> {B} suggests {day} at {t1} at {place}.
C: [Works for me|Ok|Fine]
> {C} agrees.
= {A}, {B} and {C} share the work on {topic}. They meet at {place} on {day} at {t1}.
= {B} does the slides or poster, {C} the research and {A} the text about {topic}. They meet on {day}.
-- lazy
B: [I've done my part|Mine is done]. [Where is {P}|Has {P} sent anything]?
> {B} has done {B.his} part and asks about {P}.
C: [Nothing from {P}|{P} never answers|Not a word]
> {C} has heard nothing from {P}.
A: [I'll talk to {P.him}|Let me call {P.him}]. [If not, we do it without|Otherwise we tell the teacher on {day}]
> {A} will talk to {P}.
B: [Good|Fair enough]. [It's due|We hand it in] on {day}
> They have to hand it in on {day}.
= {P} hasn't done a part of the project on {topic}. {A} will talk to {P}.
= {A}, {B} and {C} are angry with {P}. {A} will call {P}, as the {subject} project is due on {day}.
-- change topic
B: [Can we change it|I don't like the topic|That's so boring]. [What about|I'd prefer] {topic2}
> {B} would rather take {topic2}.
A: [Hm|Well], {C}?
> {A} asks {C}.
C: [I like it|Better|Yes, {topic2}]! [We found nothing on the other one|Much easier]
> {C} likes {topic2} better.
A: [Ok then|Two against one], {topic2}. [First part|Everybody reads] until {day}
> {A} gives in; the first part is due on {day}.
= {A}, {B} and {C} change the topic of the {subject} project from {topic} to {topic2}.
= {B} and {C} prefer {topic2} to {topic}, so {A} agrees. The first part is for {day}.

# new neighbour: P=person, street=street, town=town, job=job, day=day, cake=cake
A: [Have you met|Did you see] the new neighbour [yet|from number 7]? [{P.his} name is|the name is] {P}
> {A} asks {B} about the new neighbour {P}.
-- friendly
B: [Yes|Yep], [on the stairs|this morning]. {P.he} [moved here|comes] from {town}[, very nice|, quite friendly|]
> {B} has met {P}, who comes from {town}.
A: [What does {P.he} do|Did {P.he} say what {P.he} does]?
> {A} asks what {P} does.
B: {P.he}'s {job.a} I think
> {P} is {job.a}.
A: [Let's invite {P.him}|We should invite {P.him}] on {day}. I'll [bake|make] {cake.a}
> {A} wants to invite {P} on {day} and make {cake.a}.
?B: [Good idea|I'll bring wine]
= The new neighbour {P} is {job.a} from {town}. {A} and {B} will invite {P} on {day}.
= {A} will make {cake.a} and invite the new neighbour, {P}, on {day}.
-- loud
B: [Met? I can hear {P.him}|No, but I hear {P.him}]! {instr} [every night|until midnight|at 6 am]
> {B} complains that {P} plays the {instr} at night.
A: [Seriously|Poor you]? [Talk to {P.him}|Did you say something]?
> {A} says {B} should talk to {P}.
B: [I'm too shy|I don't dare]. [Would you|Can you do it]?
> {B} is too shy and asks {A} to do it.
A: [Haha ok|Sure], I'll [ring|knock] [on {day}|tonight]
> {A} will do it.
= {P}, the new neighbour, plays the {instr} at night. {A} will talk to {P} for {B}.
= {B} is annoyed because {P} plays the {instr}. {A} is going to talk to {P}.
-- party
B: [I think so|Is {P.he} the one with the {pet}]? [There was a note|{P.he} left a note]
> {B} thinks so and mentions a note.
A: [What note|What did it say]?
> {A} asks about the note.
B: [House-warming|A party] on {day}, [everyone is invited|all neighbours are welcome]
> {P} invites everyone to a party on {day}.
A: [Nice|Cool]! I'll [bring|make] {cake.a}. [Are you going|You come too]?
> {A} will bring {cake.a}.
B: [No, I'm in {town}|Can't, I'm in {town}] [until then|then]
> {B} cannot come as {B.he} is in {town}.
= The new neighbour {P} has a party on {day}. {A} will go and bring {cake.a}, {B} is in {town}.
= {A} is going to {P.poss} party on {day}. {B} is in {town} and can't come.

# second-hand sale: thing=furniture, price=price, price2=price, day=day, t1=time
A: [Hi|Hello], is the {thing} still [available|for sale]?
> {A} asks {B} whether the {thing} is still for sale.
-- bargain
B: [Yes it is|Yes]! {price2}
> {B} still has it and wants {price2}.
A: [Would you take|What about] {price}? [It has a scratch|I'm a student]
> {A} offers {price}.
B: [Hm|Well], [ok|fine], if you [collect it|fetch it] [on ]{day}
> {B} agrees if {A} collects it on {day}.
A: [Great|Deal]. [Where|Where do I come]?
> {A} asks where to come.
B: {street}, {t1}
> {A} should come to {street} at {t1}.
= {A} buys {B.poss} {thing} for {price} and will collect it in {street} on {day} at {t1}.
= {B} wanted {price2} for the {thing}, but {A} gets it for {price} and collects it on {day}.
-- sold
B: [Sorry|No], [it's gone|sold an hour ago]. [But I also have|I still have] {thing2.a}
> {B} has sold it, but still has {thing2.a}.
A: [How much is it|What do you want for it]?
> {A} asks for the price.
B: {price}
> It is {price}.
A: [I'll take it|Fine, I take it]! Can I [come|come by] [on ]{day}?
> {A} wants it and will come on {day}.
?B: [Yes|Ok], after {t1}
= The {thing} is sold, so {A} buys {B.poss} {thing2} for {price}.
= {A} wanted {thing.a}, but it is gone. {A} will get {thing2.a} from {B} on {day}.
-- no deal
B: [Yes|Still here]. {price2}, [fixed|no less]
> {B} wants {price2}.
A: [The ad said|In the ad it was] {price}!
> {A} had read {price} in the ad.
B: [That was a mistake|Typo, sorry]. [Others want it too|Take it or leave it]
> {B} says that was a mistake.
A: [Then no|No thanks]. [Bye|I'll find another one]
> {A} does not want it.
= {A} doesn't buy {B.poss} {thing}, because it costs {price2} and not {price}.
= {B} wants {price2} for the {thing}. {A} had read {price} in the ad and doesn't take it.

# watering plants: plant=plant, town=town, day=day, day2=day, pet=pet
A: [I'm going|We're off] to {town} on {day}. [Could you|Would you] [look after|water] my {plant}?
> {A} is going to {town} on {day} and asks {B} to look after {A.his} {plant}.
-- yes
B: [Sure|Of course]! [How often|What does it need]?
> {B} will do it and asks how.
A: [Once|Twice] a week. [I'm back|Back] on {day2}
> {A} will be back on {day2}.
~
B: [And the keys|Where is the key]?
> {B} asks for the key.
A: [I'll leave it with|It's with] {P}
> The key is with {P}.
= {B} will look after {A.poss} {plant} while {A} is in {town}. {P} has the key.
= {A} is going to {town} and will be back on {day2}. {B} will water the {plant}.
-- dead plant
B: [Me|Really, me]? [I killed|Remember how I killed] your {plant2} last year lol
> {B} reminds {A} that {B.he} killed the {plant2}.
A: [Oh right|True]... [who else is there|who could I ask]?
> {A} asks who else could do it.
B: {P}! {P.he} [loves plants|has a green thumb]
> {B} suggests {P}.
A: [I'll write to {P.him}|Asking {P.him} now]. [No offence|Love you anyway]!
> {A} will ask {P}.
= {A} will ask {P} to look after the {plant}, because {B} killed {plant2.a} last year.
= {A} is going to {town}. {B} thinks that {P} should water the {plant}.
-- and the pet
B: [No problem|Yes]. [And|What about] the {pet}?
> {B} agrees and asks about the {pet}.
A: [Too much to ask|If you could]? [It eats|Feed it] [in the morning|twice a day]
> {A} would be happy if {B} fed the {pet} too.
B: [I'd love that|Easy], [my kids will be happy|I always wanted one]. [Until when|Till when]?
> {B} would love that and asks until when.
A: {day2}. <thanks>!!
> {A} is away until {day2}.
= {B} will look after {A.poss} {plant} and {pet} until {day2}, while {A} is in {town}.
= {A} is away in {town} from {day} to {day2}. {B} will feed the {pet} and water the {plant}.

# evening class: hobby=hobby, place=school, day=day, t1=time, price=price
A: [I want to try|I'm signing up for|I've always wanted to learn] {hobby}. [There's a course|They have a class] at
  {place}
> {A} wants to learn {hobby} at {place}.
-- both
B: [Ooh|Fun]! [What day|When is it]?
> {B} asks when it is.
A: {day} at {t1}, {price} [a month|for ten lessons]
> It is on {day} at {t1} and costs {price}.
B: [I'm in|Sign me up too|I'll join you]!
> {B} wants to join.
A: [Yay|Great], [I'll fill in the form|I'll sign us both up]
> {A} will sign both of them up.
= {A} and {B} will learn {hobby} at {place} on {day} at {t1}.
= {A} and {B} will take a course in {hobby} at {place}. It costs {price}.
-- other hobby
B: {hobby}? [You|With two left hands]? lol. I do {hobby2} [on ]{day}, [come along|come and try]
> {B} laughs and invites {A} to {hobby2} on {day}.
A: [Hmm|Never tried]. [Is it hard|What do I need]?
> {A} asks about it.
B: [Not at all|Nothing, really]. {t1}, {place}. [The first time is free|First lesson is free]
> It is at {t1} at {place}.
A: [Ok I'll come|Why not, see you there]
> {A} will come.
= {A} wanted to learn {hobby}, but {B} invites {A} to {hobby2} on {day} at {t1}.
= {A} will try {hobby2} with {B} at {place} on {day}.
-- full
B: [It's full|No places left], [I asked|I tried last week]. [Next course in|They start again in] {month}
> {B} knows that it is full until {month}.
A: [Nooo|What a pity]. [Anything else|And now]?
> {A} is disappointed.
B: {P} [teaches|gives lessons] [at home|privately], {price} an hour
> {B} knows that {P} teaches it for {price} an hour.
A: [Give me the number|Can you ask {P.him}]!
> {A} wants to contact {P}.
= The course in {hobby} at {place} is full until {month}. {B} tells {A} that {P} gives lessons.
= {A} wants to learn {hobby}. {P} could teach {A} for {price} an hour, as the course is full.

# surprise party: P=person, place=venue, day=day, t1=time, cake=cake
A: [Psst|Secret]: surprise party for {P} on {day}[!|, don't tell {P.him}]
> {A} is planning a surprise party for {P} on {day}.
-- tasks
B: [Fun|Yay]! [Where|What can I do]?
> {B} is happy and asks for details.
A: {place}, {t1}. [Can you bring|Could you make] {cake.a}?
> It is at {place} at {t1}, and {B} is asked for {cake.a}.
B: [With pleasure|Sure]. [How do we get {P.him} there|Who brings {P}]?
> {B} agrees and asks who will bring {P}.
A: [I'll say|I'll tell {P.him}] we're going [shopping|for a walk]
> {A} will do it with a trick.
= {A} and {B} plan a surprise party for {P} at {place} on {day} at {t1}. {B} brings {cake.a}.
= {B} will make {cake.a} for {P.poss} surprise party on {day}. {A} will get {P} to {place}.
-- spoiled
C: [Ehm|Oh no]... [I told {P.him}|{P} knows]. [I thought it was no secret|It slipped out]
> {C} admits that {P} knows about it.
A: {C}!!! [Really|I can't believe it]
> {A} is angry with {C}.
B: [Let's move it|We could do it] [to|on] {day2}, [{P.he} won't expect that|then it's still a surprise]
> {B} suggests moving it to {day2}.
A: [Smart|Ok]. {place}, {t1}. [And {C}, say nothing|Not a word, {C}]
> It will be at {place} at {t1}.
= {C} told {P} about the surprise party, so {A} and {B} move it to {day2}.
= {A}, {B} and {C} move {P.poss} surprise party at {place} to {day2}, because {P} knows about it.
-- conflict
B: {day}? {P} [is in|goes to] {town} [then|that day]!
> {B} says that {P} will be in {town} then.
A: [Are you sure|How do you know]?
> {A} asks if {B} is sure.
B: [Yes|100%], [{P.he} told me|with {P.his} {kin}]. [Back|{P.he}'s back] on {day2}
> {B} is sure; {P} will be back on {day2}.
A: [Good that I asked|Ok], {day2} then. {place} at {t1}
> {A} moves the party to {day2} at {place}.
= {P} is in {town} on {day}, so the surprise party will be on {day2} at {place}.
= {A} moves {P.poss} surprise party to {day2} because {B} says {P} will be in {town}.

# swapping shifts: job=job, firm=company, day=day, day2=day, P=person
A: [Can you take|Could you do|Would you take] my shift [on ]{day}? [It's my {kin}'s birthday|I have to go to {town}]
> {A} asks {B} to take {A.his} shift on {day}.
-- swap
B: [If you take mine|Only if you do mine] on {day2}
> {B} will do it if {A} takes {day2}.
A: [Deal|Ok, fair]. [Do we have to ask|Who tells] {P}?
> {A} agrees and asks about {P}.
B: [I'll tell {P.him}|I'll write to {P.him}]. [No problem|Should be fine]
> {B} will tell {P}.
= {A} and {B} swap shifts: {B} works on {day} and {A} on {day2}. {B} will tell {P}.
= {B} takes {A.poss} shift on {day} and {A} works for {B} on {day2}.
-- boss says no
B: [I'd do it|I would], but {P} [said no swaps|doesn't allow it] [any more|until {month}]
> {B} would do it, but {P} does not allow it.
A: [Since when|That's so unfair]?
> {A} thinks that is unfair.
B: [Since|After] [you know who|Christmas]. [Talk to {P.him}|Ask {P.him} nicely]
> {B} says {A} should ask {P}.
A: [I will|Ok, wish me luck]
> {A} will do so.
= {B} can't take {A.poss} shift on {day} because {P} doesn't allow it. {A} will talk to {P}.
= {A} wants {B} to work on {day}, but must ask {P}[ first|].
-- leaves the job
B: [I can't|Sorry], [I'm leaving|{day} is my last day]! [Didn't you know|I gave notice]
> {B} cannot, because {B.he} is leaving.
A: [What|No]!! [Why|Where are you going]?
> {A} is surprised and asks why.
B: {firm} [offered me a job|hired me] as {job.a}, [more money|better hours]
> {B} will work at {firm} as {job.a}.
A: [Congrats|Happy for you], [I'll miss you|it won't be the same]. [I'll ask {P} then|]
> {A} congratulates {B} and will miss {B.him}.
= {B} can't take {A.poss} shift because of a new job as {job.a} at {firm}.
= {B} tells {A} about a new job as {job.a} at {firm}.

# shopping: item=ingredient, item2=ingredient, shop=shop, dish=dish, P=person
A: I'm at {shop}. [Do we need anything|What do we need|Shall I get something]?
> {A} is at {shop} and asks what they need.
-- list
B: {item} [and|,] {item2}, please! [I want to make|It's for the] {dish}
> {B} asks for {item} and {item2} to make {dish}.
A: [No|They have no|There's no] {item} [left|today]
> There is no {item}.
B: [Then only|Ok, just] {item2}. [And|Oh, and] bread
> {B} wants only {item2} and bread.
A: [Ok|Got it], [home in ten minutes|see you soon]
> {A} will bring it.
= {A} is at {shop} and will bring {item2} and bread. There is no {item}.
= {B} wants {item} and {item2} for {dish}, but {shop} has no {item}.
-- guest
B: [Yes|Oh yes], {P} is [coming|eating with us] tonight
> {B} says that {P} is coming.
A: [Tonight|You could have told me]? [What does {P.he} eat|What are we cooking]?
> {A} is surprised and asks what to cook.
B: {dish}. [So get|We need] {item} and {item2}
> {B} wants {dish} with {item} and {item2}.
~
A: [Anything to drink|And wine]?
> {A} asks about drinks.
B: [{P} brings that|No, we have enough]
= {P} is coming to eat tonight. {A} will buy {item} and {item2} for {dish}.
= {A} gets {item} and {item2} at {shop}, because {A} and {B} are making {dish} for {P}.
-- forgot the money
B: [Just|Only] {item}, <thanks>
> {B} wants {item}.
A: [Oh no|Damn]. [I left my wallet|No wallet on me|My card doesn't work]
> {A} cannot pay.
B: [Haha|Lol]. I'm [near there|two streets away], [wait|wait at the door]
> {B} is near and tells {A} to wait.
A: [Hurry|I'm by the till]! [There's a queue behind me|Everybody is staring]
> {A} tells {B} to hurry.
= {A} wants to buy {item} at {shop} but can't pay. {B} is coming to help.
= {A} can't pay for the {item} at {shop}, so {B} is coming.

# book: book=book, P=person, day=day, place=venue, book2=book
A: [Have you finished|Did you read|How far are you with] {book}? [We meet|Book club is] [on ]{day}
> {A} asks {B} about {book}, since the book club meets on {day}.
-- loved it
B: [Last night|Yes]! [I cried|I couldn't stop|What an ending]
> {B} has finished it and liked it.
A: [Really|Hm]? I [found it boring|gave up|fell asleep] [after page 50|]
> {A} found it boring.
B: [You have to go on|The second half is great]! [Try again|Promise me]
> {B} thinks {A} should go on.
A: [Ok|Fine], [I'll try|one more chance]. [See you|We're] at {place}
> {A} will try; they meet at {place}.
= {B} loved {book}, but {A} found it boring and will try again before {day}.
= {A} and {B} talk about {book}. They will meet at {place} on {day}.
-- lend
B: [I haven't got it|It was sold out|I can't find it anywhere]. [Can you lend me yours|Are you done with yours]?
> {B} does not have it and would like to borrow it.
A: {P} has it. I'll [ask {P.him}|get it back]
> {P} has {A.poss} copy, and {A} will ask.
~
B: <thanks>. [And next time|Next month] I [choose|vote for] {book2}
> {B} wants {book2} next time.
A: [Good choice|Oh no, not that]
= {B} needs {book} for the book club on {day}. {A} will get it from {P}.
= {A} will ask {P} for {book}, so that {B} can read it. {B} wants to read {book2} next.
-- skip
B: [Not even started|Page 3], [I had no time|too much work]. [I think I'll skip it|I won't come]
> {B} has not read it and does not want to come.
A: [Come anyway|Nobody has read it lol]! {P} [watched the film|brings wine]
> {A} says {B} should come anyway.
B: [Haha ok|Then yes]. {place}[ again|]?
> {B} will come and asks whether it is at {place}.
A: [Yes|Yep], at {t1}
> It is at {t1}.
= {B} hasn't read {book} but will come to the book club at {place} on {day}.
= {A} gets {B} to come to the book club on {day} without having read {book}.

# baby news: P=woman, N=babyname, kin=kin, day=day, gift=gift
A: [It's a girl|It's a boy|The baby is here]!! {P} [had|got] [the|her] baby [this morning|last night]
> {A} has news: {P} has had a baby.
-- visit
B: [Awww|Wonderful|Oh my]! [What's the name|Has it got a name]?
> {B} is happy and asks for the name.
A: {N}. [So tiny|So cute|3 kilos]
> The baby is called {N}.
B: [Can we visit|When can we see them]?
> {B} would like to visit them.
A: [They come home|They're home] on {day}. [Let's go together|We could go then]
> They come home on {day}, and {A} wants to go together.
?B: [I'll bring|I'll get] {gift.a}
> {B} will bring {gift.a}.
= {P} had a baby called {N}. {A} and {B} will visit them on {day}.
= {A} tells {B} that {P.poss} baby {N} is here. They want to visit on {day}.
-- name debate
B: [Congrats|So happy]! [Is it called|Did they call it] {N2}, [like her {kin}|as planned]?
> {B} asks whether it is called {N2}.
A: [No|Nope], {N}! They [changed their mind|couldn't agree]
> It is called {N}, because they changed their mind.
B: [Hm, {N}|Oh]. [I like that|Better|Unusual]
> {B} comments on the name.
A: [They need|{P} could use] {gift.a}, [shall we|together]?
> {A} suggests giving {gift.a}.
B: [Yes|<yes>], [half half|I'm in]
> {B} agrees.
= {P} called her baby {N}, not {N2}. {A} and {B} will give her {gift.a}.
= {A} and {B} want to give {P} {gift.a} for her baby {N}.

# outing: place=sight, town=town, day=day, hour=hour, P=person
A: [Who wants to|Shall we] [go to|see] {place} in {town} [on ]{day}?
> {A} wants to go to {place} in {town} on {day}.
-- rain
B: [They say rain|It will rain all day|Check the weather]. [How about|Rather] {day2}?
> {B} expects rain and suggests {day2}.
A: [Ok|Sun is better, yes], {day2}. [Meet|We meet] at {hour}?
> {A} agrees and suggests {hour}.
~
C: [Can I bring|Is it ok if I bring] {P}?
> {C} asks to bring {P}.
A: [Sure|The more the better]!
> {A} agrees.
= {A}, {B} and {C} will go to {place} in {town} on {day2} at {hour}. {C} brings {P}.
= Because of the rain {A} and {B} will go to {place} on {day2}, with {C} and {P}.
-- closed
B: [It's closed|They're closed] [on {day}|] until {month}!
> {B} says it is closed until {month}.
A: [Oh|Really]? [What else is there|Any other ideas]?
> {A} asks for other ideas.
B: {place2}! [I was there as a child|Free entry]
> {B} suggests {place2}.
A: [Great|Let's do that]. {hour} at the [station|bus stop]
> They meet at {hour}.
= {place} is closed, so {A} and {B} go to {place2} on {day} at {hour}.
= {A} and {B} will visit {place2} on {day}, as {place} is closed until {month}.
-- four people
B: [Me|I'm in]!
> {B} wants to come.
C: [Me too|Count on me]. [Do we take|By] [the train|your car]?
> {C} wants to come too.
D: [I can't|Not me], [I'm with {P}|I help {P} that day] :(
> {D} cannot come because of {P}.
A: [Next time, {D}|Pity, {D}]. [The others|Rest]: {hour}, my [place|car]
> {A} is sorry for {D}; the others meet at {hour}.
= {A}, {B} and {C} are going to {place} in {town} on {day} at {hour}. {D} can't come.
= {A} will go to {place} with {B} and {C}, but {D} is with {P}.

# noise and party: day=day, t1=time, P=person, dish=dish, gift=gift
A: [Party at my place|I'm having a party|My flat, party] [on ]{day}, {t1}. [Who's coming|Are you coming]?
> {A} invites the others to a party on {day} at {t1}.
-- brings
B: [Of course|Sure]! [What shall I bring|Shall I bring something]?
> {B} will come and asks what to bring.
A: [Maybe|How about] {dish}? [Yours is the best|Everybody loved it last time]
> {A} would like {dish}.
C: [And I|I could] bring {P}, [ok|if that's ok]?
> {C} asks to bring {P}.
A: [Only if {P.he} doesn't sing|Sure] lol
> {A} agrees.
= {A} has a party on {day} at {t1}. {B} will bring {dish} and {C} will bring {P}.
= {B} and {C} are coming to {A.poss} party on {day}. {B} brings {dish}.
-- four answers
B: [Yes|I'll be there]!
> {B} will come.
C: [I can't|Sorry], [I'm in {town}|I'm visiting {P} in {town}]
> {C} cannot come because {C.he} is in {town}.
D: [I'll be late|A bit later], [after {sport}|{sport} first]
> {D} will come later, after {sport}.
A: [Ok|Fine]. [Have fun {C}|Next time {C}]
> {A} is fine with that.
= {A} has a party on {day}. {B} will come, {D} will be late and {C} is in {town}.
= {B} and {D} will come to {A.poss} party, but {C} is in {town} and can't.
-- avoids
B: [Is {P} coming|Did you invite {P}]?
> {B} asks whether {P} is coming.
A: [Yes|I think so]. [Why|Still angry]?
> {A} says yes and asks why.
B: [Then I won't come|Then without me]. {P.he} [still owes me {price}|never gave me back my {loan}]
> {B} does not want to come, since {P} owes {B.him} something.
A: [Come on|Please]. [I'll talk to {P.him}|It's a chance to make peace]
> {A} wants {B} to come.
B: [I'll think about it|Maybe], [no promises|let's see]
> {B} will think about it.
= {B} may not come to {A.poss} party on {day}, being angry with {P}.
= {A} invites {B} to a party on {day}. {B} doesn't want to see {P}, but will think about it.
"""

# ----------------------------------------------------------------------------------------------------------------------
# Reading the tables
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    role: str
    text: str
    retold: str = ""
    optional: bool = False


@dataclass
class Ending:
    """One complete story: opening and ending of a scenario (None: small talk may go here), and its summaries."""

    name: str
    kinds: dict[str, str]
    turns: list[Turn | None] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)

    @property
    def group(self) -> bool:
        return any(turn and turn.role == "C" for turn in self.turns)


def read_turns(block: str) -> list[Turn | None]:
    """Turns of a block of the tables; None stands for `~`."""
    turns: list[Turn | None] = []
    for line in block.strip().splitlines():
        if line == "~":
            turns.append(None)
        elif line.startswith("> "):
            turns[-1].retold = line[2:]
        else:
            role, text = line.split(":", 1)
            turns.append(Turn(role.lstrip("?"), text.strip(), optional=role.startswith("?")))
    return turns


@cache
def chunks(table: str) -> tuple[tuple[Turn, ...], ...]:
    """The blocks of SMALL_TALK and its like."""
    return tuple(tuple(read_turns(block)) for block in table.strip().split("\n\n"))


@cache
def endings() -> tuple[Ending, ...]:
    """All stories of SCENARIOS."""
    stories = []
    table = re.sub(r"\n  +", " ", SCENARIOS.strip())  # an indented line continues the one above
    for block in re.split(r"^# ", table, flags=re.M)[1:]:
        opening, *rest = re.split(r"^-- ", block, flags=re.M)
        header, opening = opening.split("\n", 1)
        title, declared = header.split(":")
        kinds = dict(pair.strip().split("=") for pair in declared.split(",") if pair.strip())
        for part in rest:
            name, body = part.split("\n", 1)
            lines = body.strip().splitlines()
            told = "\n".join(line for line in lines if not line.startswith("= "))
            story = Ending(f"{title}, {name}", kinds, read_turns(opening) + read_turns(told))
            story.summaries = [line[2:] for line in lines if line.startswith("= ")]
            stories.append(story)
    return tuple(stories)


@cache
def pools() -> dict[str, dict[str, tuple[str, ...]]]:
    """kind -> split -> values; the split "pretrain" holds the patterns of invented values."""
    table = {}
    for entry in re.split(r"\n(?=\S)", POOLS.strip()):
        kind, values = entry.split(":", 1)
        parts = [" ".join(part.split()) for part in re.split(r"\s/\s", values)]
        table[kind] = {
            split: tuple(value for item in part.split(",") for value in wordings(item.strip()))
            for split, part in zip((*SPLITS, "pretrain"), parts, strict=True)
        }
    return table


def wordings(text: str) -> list[str]:
    """Every wording of a text with [a|b] choices."""
    choice = re.search(r"\[([^\[\]]*)\]", text)
    if not choice:
        return [text]
    before, after = text[: choice.start()], text[choice.end() :]
    return [w for option in choice[1].split("|") for w in wordings(before + option + after)]


def choose(text: str, rng: random.Random) -> str:
    """One wording of a text with <macros> and nested [a|b] choices."""
    text = re.sub(r"<(\w+)>", lambda m: MACROS[m[1]], text)
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), text)
    return re.sub(r"\s+([,.!?])", r"\1", " ".join(text.split()))


# ----------------------------------------------------------------------------------------------------------------------
# Filling the slots
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    name: str
    woman: bool

    def form(self, form: str) -> str:
        """A pronoun in its "he" form, or `poss`: the name's possessive."""
        if form == "poss":
            return self.name + "'s"
        return {"he": "she", "him": "her", "his": "her", "himself": "herself"}[form] if self.woman else form


def invent(rng: random.Random, capital: bool) -> str:
    """A word that nobody has used before: two or three syllables, or random letters, which leave nothing to guess."""
    if rng.random() < 0.3:
        letters = "aaabcdeeeefghiiijklmnooopqrrsstttuuvwxyz"
        word = "".join(rng.choice(letters) for _ in range(rng.choice((3, 4, 5, 6, 7, 8))))
    else:
        pick = lambda sounds: rng.choice(sounds.split("-"))
        onsets = "b-br-c-ch-d-dr-f-fl-g-gr-h-j-k-l-m-n-p-pl-qu-r-s-sh-sk-st-t-tr-v-w-y-z"
        nuclei = "a-e-i-o-u-a-e-i-o-a-e-i-ai-ee-ou-ia-ea-oo"
        word = "".join(pick(onsets) + pick(nuclei) for _ in range(rng.choice((1, 2, 2, 3))))
        word += pick("--n-l-r-s-m-t-ck-nd-x-rt-lla-na-ra-ston-ley-per-den-rick-tine")
    return word.capitalize() if capital else word


@cache
def held_out_values() -> frozenset[str]:
    """Everything that only validation and test may say, in lower case."""
    values = {v for pool in pools().values() for split in ("validation", "test") for v in pool[split]}
    names = {n for table in (WOMEN, MEN) for split in ("validation", "test") for n in table[split].split()}
    return frozenset(value.lower() for value in values | names)


def draw_value(kind: str, split: str, rng: random.Random) -> str:
    """One value of a kind; for `pretrain` half of the values are invented."""
    if kind in COMMON:
        return rng.choice(COMMON[kind])
    if split != "pretrain":
        return rng.choice(pools()[kind][split])
    if rng.random() < 0.5:
        return rng.choice(pools()[kind]["train"])
    pattern = rng.choice(pools()[kind]["pretrain"])
    value = re.sub(r"[*^]", lambda m: invent(rng, m[0] == "^"), pattern)
    return draw_value(kind, split, rng) if value.lower() in held_out_values() else value


# More first names for `pretrain`, by sex; whoever pretrains fills them in.
REAL_NAMES: dict[str, list[str]] = {"f": [], "m": []}


def draw_person(split: str, rng: random.Random, woman: bool, invented: bool) -> Person:
    if invented:
        real = REAL_NAMES["f" if woman else "m"]
        name = rng.choice(real) if real and rng.random() < 0.5 else invent(rng, capital=True)
        return draw_person(split, rng, woman, invented) if name.lower() in held_out_values() else Person(name, woman)
    table = WOMEN if woman else MEN
    return Person(rng.choice(table["train" if split == "pretrain" else split].split()), woman)


SLOT = re.compile(r"\{(\w+)[.}]")
ROLE = re.compile(r"[A-DXYZPQ]9?")
KIND_OF = {"t": "time", "n": "number", "N": "petname", "ill": "ailment", "instr": "instrument", "doc": "doctor"}


def draw_facts(texts: list[str], kinds: dict[str, str], split: str, rng: random.Random) -> dict[str, str | Person]:
    """Values for all the slots that the texts mention: no two alike, the ordered ones rising with their number."""
    slots = sorted(set(SLOT.findall(" ".join(texts))))
    facts: dict[str, str | Person] = {}
    for slot in slots:
        used = {f.name if isinstance(f, Person) else f for f in facts.values()}
        while True:
            if ROLE.fullmatch(slot):
                # At least one invented person keeps every pretraining story apart from those of train.
                invented = split == "pretrain" and (slot == "A" or rng.random() < 0.6)
                value = draw_person(split, rng, kinds.get(slot) == "woman" or rng.random() < 0.5, invented)
                name = value.name
            else:
                value = name = draw_value(kind_of(slot, kinds), split, rng)
            if name not in used:
                break
        facts[slot] = value
    for kind in ORDERED:
        same = [slot for slot in slots if not ROLE.fullmatch(slot) and kind_of(slot, kinds) == kind]
        # Only the digit at the end counts: t1 < t2, hour < hour2.
        values = sorted((facts[slot] for slot in same), key=COMMON[kind].index)
        facts.update(zip(same, values, strict=True))
    return facts


def kind_of(slot: str, kinds: dict[str, str]) -> str:
    base = slot.rstrip("0123456789")
    return kinds.get(slot) or kinds.get(base) or KIND_OF.get(base, base)


def fill(text: str, facts: dict[str, str | Person]) -> str:
    """Put the facts into the slots and start every sentence with a capital."""

    def value(match: re.Match) -> str:
        fact, form = facts[match[1]], match[2]
        if isinstance(fact, Person):
            return fact.form(form) if form else fact.name
        if form == "a":
            return f"{'an' if fact[0].lower() in 'aeio' else 'a'} {fact}"
        return fact

    text = re.sub(r"\{(\w+)(?:\.(\w+))?\}", value, text)
    text = re.sub(r"\b(the|The|a) the\b", lambda m: "the" if m[1] == "a" else m[1], text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


# ----------------------------------------------------------------------------------------------------------------------
# From a story to a chat
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How one person types: the share of messages or words that each habit touches."""

    lower: bool
    shorthand: float
    emoji: float
    typos: float
    filler: float
    split: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Style":
        lower = rng.random() < 0.25
        return cls(
            lower,
            shorthand=rng.choice((0.0, 0.0, 0.1, 0.4)),
            emoji=rng.choice((0.0, 0.1, 0.25, 0.4)),
            typos=rng.choice((0.0, 0.0, 0.01, 0.04)),
            filler=rng.choice((0.0, 0.05, 0.15)),
            split=rng.choice((0.0, 0.05, 0.2)),
        )


def type_like(style: Style, text: str, facts: dict, rng: random.Random) -> list[str]:
    """The messages in which somebody types a turn. Habits touch the wording only, never the facts in it."""
    if rng.random() < style.filler and not re.match(r"[{<\[]|I\b|I'|[A-Z]{2}", text):
        text = f"{rng.choice(FILLERS)}, {text[0].lower()}{text[1:]}"
    for word, short in SHORTHAND.items():
        text = re.sub(rf"\b{word}\b", lambda m, s=short: s if rng.random() < style.shorthand else m[0], text)

    def typo(match: re.Match) -> str:
        word = match[0]
        if rng.random() >= style.typos:
            return word
        i = rng.randrange(1, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]

    pieces = re.split(r"(\{[^}]*\})", text)  # the odd pieces are slots
    pieces[::2] = [re.sub(r"\b[a-z]{5,}\b", typo, piece) for piece in pieces[::2]]
    if style.lower:
        pieces[::2] = [piece.lower() for piece in pieces[::2]]
        filled = fill_as_is(pieces, facts)
    else:
        filled = fill("".join(pieces), facts)
    messages = [filled]
    if rng.random() < style.split:
        messages = [m for m in re.split(r"(?<=[.!?]) ", filled, maxsplit=1) if m]
    messages = [re.sub(r"(?<=[\w)])\.$", "", message) for message in messages]
    if rng.random() < style.emoji and not re.search(r":\($", messages[-1]):
        messages[-1] += " " + rng.choice(SAD if SAD_WORDS.search(messages[-1]) else HAPPY)
    return messages


def fill_as_is(pieces: list[str], facts: dict) -> str:
    """`fill` for somebody who never types a capital; the facts keep theirs."""
    return "".join(piece if i % 2 == 0 else fill(" " + piece, facts)[1:] for i, piece in enumerate(pieces))


def with_roles(turns: tuple[Turn, ...], roles: dict[str, str]) -> list[Turn]:
    """A chunk of small talk, its X, Y, Z played by roles of the story."""
    swap = lambda text: re.sub(r"\{([XYZ])(?=[.}])", lambda m: "{" + roles[m[1]], text)
    return [Turn(roles.get(turn.role, turn.role), swap(turn.text), swap(turn.retold)) for turn in turns]


def arrange(story: Ending, rng: random.Random) -> list[Turn]:
    """The turns of one telling: optional ones drawn, small talk, newcomers, greetings and farewells put in."""
    roles = sorted({turn.role for turn in story.turns if turn})
    turns: list[Turn] = []
    if rng.random() < 0.35:
        turns += rng.choice(chunks(GREETINGS))
    drop_optional = rng.random() < 0.4
    for turn in [*story.turns, None]:
        if turn is None:
            x = turns[-1].role
            y = rng.choice([role for role in roles if role != x])
            luck = rng.random()
            if luck < 0.3:
                turns += with_roles(rng.choice(chunks(SMALL_TALK)), {"X": x, "Y": y})
            elif luck < 0.55 and len(roles) == 2:
                turns += with_roles(rng.choice(chunks(NEWCOMERS)), {"X": x, "Y": y, "Z": "C"})
        elif not (turn.optional and drop_optional):
            turns.append(turn)
    if rng.random() < 0.2:
        turns += rng.choice(chunks(FAREWELLS))
    return turns


def tell(story: Ending, split: str, rng: random.Random) -> dict | None:
    """One telling of a story: scenario, facts, dialogue, summary, narration.

    None when the summary would say what the wording chosen for the turns leaves out.
    """
    turns = [Turn(t.role, choose(t.text, rng), choose(t.retold, rng)) for t in arrange(story, rng)]
    summary = choose(rng.choice(story.summaries), rng)
    roles = {turn.role for turn in turns}
    said = roles | set(SLOT.findall(" ".join(turn.text for turn in turns)))
    if not set(SLOT.findall(summary)) <= said:
        return None
    for turn in turns:
        if not set(SLOT.findall(turn.retold)) <= said:
            turn.retold = ""
    texts = [t.text + t.retold for t in turns] + [summary, *("{" + role + "}" for role in roles)]
    facts = draw_facts(texts, story.kinds, split, rng)
    styles = {role: Style.draw(rng) for role in sorted(roles)}
    lines = []
    for turn in turns:
        lines += [f"{facts[turn.role].name}: {m}" for m in type_like(styles[turn.role], turn.text, facts, rng)]
    return {
        "scenario": story.name,
        "facts": {slot: f.name if isinstance(f, Person) else f for slot, f in sorted(facts.items())},
        "dialogue": "\n".join(lines),
        "summary": sentence(summary, facts),
        "narration": " ".join(sentence(turn.retold, facts) for turn in turns if turn.retold),
    }


def sentence(text: str, facts: dict) -> str:
    """A filled third-person text that ends with a full stop."""
    return fill(text, facts).rstrip(". ") + "."


def records(split: str, seed: int = SEED) -> Iterator[dict]:
    """Rows of a split with all that is known about them: id, scenario, facts, dialogue, summary, narration.

    Endless for "pretrain". The other splits end after SIZES[split] rows, and no two rows share a
    scenario with its facts, or a dialogue.

    Raises ValueError for an unknown split.
    """
    if split not in (*SPLITS, "pretrain"):
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}, pretrain")
    rng = random.Random(f"{split}-{seed}")  # a text seed: stable over processes, unlike hash()
    seen: set = set()
    count = 0
    while count < SIZES.get(split, float("inf")):
        story = rng.choice(endings())
        if not story.group and rng.random() < 0.3:  # more of the rarer chats of three or four
            continue
        row = tell(story, split, rng)
        if row is None:
            continue
        turns, words = row["dialogue"].count("\n") + 1, len(row["dialogue"].split())
        fits = MIN_TURNS <= turns <= MAX_TURNS and words <= MAX_DIALOGUE_WORDS
        if not fits or not MIN_SUMMARY_WORDS <= len(row["summary"].split()) <= MAX_SUMMARY_WORDS:
            continue
        if split != "pretrain":
            keys = {(row["scenario"], tuple(row["facts"].items())), row["dialogue"]}
            if keys & seen:
                continue
            seen |= keys
        count += 1
        yield {"id": f"{split}-{count}", **row}


def write_sample(folder: Path) -> None:
    """Write {train,validation,test}.jsonl into a folder: UTF-8, one JSON object a line.

    Rows of the grammar and freely written ones take turns.
    """
    import chats  # it is built on this module

    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        pairs = zip(islice(records(split), SIZES[split] // 2), chats.sample_rows(split), strict=True)
        rows = [{"id": f"{split}-{i + 1}", "dialogue": row["dialogue"], "summary": row["summary"]}
                for i, row in enumerate(chain.from_iterable(pairs))]  # fmt: skip
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{folder / split}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    write_sample(Path(__file__).parent / "sample")
