"""About 1,500 tokens of ordinary prose, written for this demo, with a number hidden among its sentences."""

from __future__ import annotations

PARAGRAPHS = (
    "The ferry to the island leaves from the old stone pier a little after seven, when the fog is usually still "
    "lying on the water. Most of the passengers know one another. They carry newspapers, baskets, a folded "
    "bicycle or two, and they stand on the left side of the deck because the wind comes from the right. The "
    "captain, a woman in her sixties who learned the trade from her uncle, says that she could make the crossing "
    "with her eyes closed, and that on some mornings in November she very nearly does.",
    "On the island there is one road, which begins at the harbour and ends at the lighthouse. Halfway along it "
    "stands the school, a low white building with eleven pupils and a garden. The teacher came for a single "
    "winter and stayed for nineteen years. She keeps bees behind the gymnasium, and every autumn the children "
    "sell the honey at the harbour to pay for a trip to the city, where they visit the museum of science and eat "
    "far too much ice cream.",
    "The bakery opens before the school does. Its oven was built in the year of the great storm, from bricks that "
    "had been the chimney of the cannery, and it has been lit every working day since. People argue about which "
    "loaf is best. Fishermen prefer the dark rye, which keeps for a week at sea; visitors ask for the small rolls "
    "with caraway; and the baker himself, if you press him, admits that he eats mostly toast.",
    "In summer the population triples. Painters arrive with easels, families rent the cottages beyond the "
    "meadow, and an orchestra of students rehearses in the empty boat shed, because the wooden roof gives the "
    "cellos a warm and generous sound. Nobody complains about the noise. On the last evening of August they play "
    "outdoors, and the ferry waits for an extra hour so that the audience from the mainland can get home.",
    "Winter is another matter. When the ice comes, the boat stops, and the mail is carried across on a sledge by "
    "two brothers who have never been known to agree on anything except the route. They test the ice with an iron "
    "bar every fifty paces. Once, in a thaw, they had to turn back with a wedding dress, three letters from the "
    "tax office and a crate of oranges, and the wedding was held a week late, with oranges for every guest.",
    "The lighthouse no longer needs a keeper, but it has one. He was an engineer for the railway until his knees "
    "gave out, and he answered an advertisement that offered a house, a view, and almost no money. He paints the "
    "railings, counts the birds for the university, and shows the lamp to anyone who climbs the hundred and forty "
    "steps. In the evening he writes long letters to his sister in Canada about clouds, engines and soup.",
    "There is a library, too, in what used to be the customs house. It has four thousand books and a stove. The "
    "rule is that you may borrow as many as you can carry, and that you must write one sentence about each of "
    "them on a card before you bring it back. The cards are the most popular thing in the building. People come "
    "in from the rain to read what their neighbours thought of a novel, and some of the sentences have become "
    "sayings that are repeated all over the island by people who never opened the book.",
    "Fishing is not what it was. The herring went north, and the young people went to the mainland to study law "
    "or to repair wind turbines. But in the last few years some of them have come back with plans. One couple "
    "grows mussels on ropes in the sheltered bay. Another has turned the net loft into a workshop for wooden "
    "boats, and there is a waiting list of two years for a simple rowing boat with a red stripe. The council "
    "argues about all of it on the first Monday of every month, at great length and with excellent cake.",
    "Last spring a storm took the roof off the boat shed and laid it, almost undamaged, in the meadow. It took "
    "sixty people, two tractors and a retired professor of mechanics to put it back. The professor stood on a "
    "barrel and shouted instructions that nobody could hear over the wind, and afterwards everyone agreed that "
    "it could not have been done without him. The orchestra came as usual in July, and the cellos sounded, if "
    "anything, a little warmer than before.",
    "Not everything on the island is old. Behind the harbour stands a glass pavilion, put up four years ago by an "
    "architect who had come for a weekend and missed the boat. It holds a heated pool of sea water, and on Thursdays "
    "it is reserved for people over seventy, who use it chiefly to talk. The heat comes from the bakery. A pipe "
    "carries what the oven would otherwise waste under the road, and in the coldest weeks a strip of green grass "
    "shows exactly where it runs, so that the sheep stand along it in a line like guests at a buffet.",
    "Of the sheep there is a good deal to say. They belong to a cooperative, they answer to no dog, and they have "
    "learned to open the gate of the churchyard, where the grass is sweeter. The pastor has given up. He claims "
    "that the graves have never been so tidy, and at Easter he includes the flock in his prayers, between the "
    "fishermen and the county council. The wool goes to a mill on the mainland and comes back as grey sweaters "
    "that scratch for the first ten years and then last for another forty.",
    "The oldest inhabitant is a retired telegraph operator of ninety-eight. She remembers the day the cable was "
    "laid, the day it broke, and the long afternoon on which the whole island waited for news of a submarine and "
    "received, by mistake, the results of a chess tournament in Vienna. She still taps messages on the arm of her "
    "chair when she is thinking. Her great-grandson, who is nine, has learned the code in secret, and sits beside "
    "her after school, saying nothing, with his eyes on her finger.",
    "On clear nights the astronomers come. They are amateurs, a postman, a dentist and a pair of twins who study "
    "music, and they set up their telescopes on the football field, because it is flat and because nobody scores "
    "in the dark. They are generous with their eyepieces. Half the island has seen the rings of Saturn from the "
    "penalty spot, and the dentist keeps a notebook in which everyone who looks must write one word.",
    "If you go, take good shoes and something to read. The hotel has six rooms, all of them facing the water, and "
    "a dog that belongs to nobody in particular. Breakfast is served until the bread is gone. The last ferry back "
    "leaves at half past eight, and the captain, who notices everything, will not wait for you, unless it is the "
    "last evening of August, when she waits for everyone.",
)


# Answered by the prose itself, for a second question over the same text.
FOLLOW_UP = ("How many books does the library have?", "four thousand")


def document(word: str, number: int) -> str:
    """The prose with `needle(word, number)` among the sentences of its middle."""
    paragraphs = [paragraph.split(". ") for paragraph in PARAGRAPHS]
    paragraphs[4].insert(2, needle(word, number).rstrip("."))
    return "\n\n".join(". ".join(sentences) for sentences in paragraphs)


def needle(word: str, number: int) -> str:
    """The sentence that hides `number`, of six digits, under `word`."""
    return f"The special magic number for {word} is {number}."


def question(word: str) -> str:
    """What to ask for the number of `word`."""
    return f"What is the special magic number for {word} mentioned in the text?"
