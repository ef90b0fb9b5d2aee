"""Word problems with worked answers, made from templates: as many as wanted, from a seed.

Written for this project and free to use like the rest of it. The 25 problems that ./test.sh falls
back to (expert_profiler/data/word_problems.txt) are not among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator


def words(text: str) -> list[str]:
    """The words of a text, or its parts between commas."""
    return text.split(",") if "," in text else text.split()


NAMES = words(
    "Priya Tomas Amara Jonas Lucia Dev Hana Mei Omar Ben Yuki Carla Noor Eva Mateo Grace Ines Kofi "
    "Lena Marco Nadia Oskar Paula Rafael Sara Theo Uma Viktor Wanda Zoe Alice Bruno Clara Dario"
)
THINGS = words(
    "apples pears plums stickers marbles stamps pencils notebooks postcards shells buttons beads "
    "candles cookies muffins rolls bagels tulips roses bulbs seeds bricks tiles bolts cards books"
)
HOLDERS = words("boxes bags baskets trays crates jars cartons packets drawers shelves")
PLACES = words("bakery library market garden museum workshop farm school station bookshop")
WORKERS = words("baker farmer teacher gardener painter tailor carpenter printer driver cook")
GOODS = words("helmet bicycle camera tent guitar lamp jacket scooter kite telescope clock")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

Draw = random.Random
#: What a template gives: the question, and the lines of its answer.
Problem = tuple[str, list[str]]


def two(rng: Draw, words: list[str]) -> tuple[str, str]:
    """Two different ones of ``words``."""
    first, second = rng.sample(words, 2)
    return first, second


def packed(rng: Draw) -> Problem:
    place, thing, holder = rng.choice(PLACES), rng.choice(THINGS), rng.choice(HOLDERS)
    a, b, more = rng.randint(4, 24), rng.randint(6, 30), rng.randint(2, 6)
    sold = rng.randint(a, a * b // 2)
    left = a * b - sold
    question = (
        f"A {place} fills {a} {holder} with {b} {thing} each. By noon {sold} {thing} are sold, and "
        f"{more} more full {holder} are brought out. How many {thing} are there now?"
    )
    return question, [
        f"At first there are {a} * {b} = {a * b} {thing}.",
        f"After the sale there are {a * b} - {sold} = {left} {thing}.",
        f"The new {holder} hold {more} * {b} = {more * b} {thing}.",
        f"Together that makes {left} + {more * b} = {left + more * b} {thing}.",
    ]


def saving(rng: Draw) -> Problem:
    name, good = rng.choice(NAMES), rng.choice(GOODS)
    weekly, weeks, gift = rng.randint(3, 15), rng.randint(4, 20), rng.randint(5, 40)
    cost = weekly * weeks + gift
    question = (
        f"{name} saves ${weekly} every week for a {good} that costs ${cost}. An aunt gives {name} "
        f"${gift} towards it. How many weeks must {name} save before buying the {good}?"
    )
    return question, [
        f"With the gift {name} still needs {cost} - {gift} = {cost - gift} dollars.",
        f"That takes {cost - gift} / {weekly} = {weeks} weeks.",
    ]


def carriages(rng: Draw) -> Problem:
    a, b, more = rng.randint(4, 12), rng.choice([24, 32, 40, 48, 64, 80]), rng.randint(5, 60)
    share = rng.choice([2, 4, 8])
    taken = a * b // share
    empty = a * b - taken - more
    word = {2: "Half", 4: "A quarter", 8: "One eighth"}[share]
    question = (
        f"A train has {a} carriages with {b} seats each. {word} of the seats are taken when it "
        f"leaves the station, and {more} more people board at the next stop. How many seats are "
        f"still empty?"
    )
    return question, [
        f"The train has {a} * {b} = {a * b} seats.",
        f"At the station {a * b} / {share} = {taken} seats are taken.",
        f"After the next stop {taken} + {more} = {taken + more} seats are taken.",
        f"So {a * b} - {taken + more} = {empty} seats are empty.",
    ]


def rows_of_plants(rng: Draw) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(words("carrots beans onions tulips tomatoes"))
    a, b, lost = rng.randint(4, 12), rng.randint(10, 30), rng.randint(3, 30)
    question = (
        f"{name} plants {a} rows of {thing} with {b} seeds in each row. Rabbits eat {lost} of the "
        f"young plants. How many {thing} are left to grow?"
    )
    return question, [
        f"{name} plants {a} * {b} = {a * b} seeds.",
        f"After the rabbits there are {a * b} - {lost} = {a * b - lost} {thing} left.",
    ]


def three_days(rng: Draw) -> Problem:
    place, thing, day = rng.choice(PLACES), rng.choice(THINGS), rng.randrange(5)
    first, more = 2 * rng.randint(20, 160), rng.randint(5, 60)
    half = first // 2
    one, other, third = DAYS[day : day + 3]
    question = (
        f"A {place} sells {first} {thing} on {one}, half as many on {other}, and {more} more on "
        f"{third} than on {other}. How many {thing} does it sell in the three days together?"
    )
    return question, [
        f"On {other} it sells {first} / 2 = {half} {thing}.",
        f"On {third} it sells {half} + {more} = {half + more} {thing}.",
        f"Together that makes {first} + {half} + {half + more} = {first + half + half + more} "
        f"{thing}.",
    ]


def together(rng: Draw) -> Problem:
    one, other = two(rng, NAMES)
    a, b, hours, lost = rng.randint(4, 12), rng.randint(3, 9), rng.randint(2, 6), rng.randint(2, 9)
    thing = rng.choice(words("paper cranes,paper boats,bracelets,masks,lanterns"))
    question = (
        f"{one} can make {a} {thing} in an hour, and {other} can make {b} in the same time. They "
        f"work together for {hours} hours. How many {thing} do they have if {lost} of them tear?"
    )
    made = (a + b) * hours
    return question, [
        f"In an hour they make {a} + {b} = {a + b} {thing}.",
        f"In {hours} hours they make {a + b} * {hours} = {made} {thing}.",
        f"If {lost} tear, {made} - {lost} = {made - lost} {thing} are left.",
    ]


def tank(rng: Draw) -> Problem:
    week, end = rng.randint(10, 40), rng.randint(20, 60)
    used = 5 * week + 2 * end
    full = used + rng.randint(10, 200)
    question = (
        f"A tank holds {full} litres of rainwater. The garden takes {week} litres a day on "
        f"weekdays and {end} litres a day at the weekend. How many litres are left after one full "
        f"week?"
    )
    return question, [
        f"On weekdays the garden takes 5 * {week} = {5 * week} litres.",
        f"At the weekend it takes 2 * {end} = {2 * end} litres.",
        f"So {full} - {5 * week} - {2 * end} = {full - used} litres are left.",
    ]


def tickets(rng: Draw) -> Problem:
    a, b = rng.randint(2, 8), rng.randint(9, 15)
    children, adults, cost = rng.randint(20, 90), rng.randint(20, 80), rng.randint(50, 200)
    income = a * children + b * adults
    what = rng.choice(["school play", "concert", "puppet show", "garden tour"])
    question = (
        f"Tickets for the {what} cost ${a} for children and ${b} for adults. On {rng.choice(DAYS)} "
        f"{children} children and {adults} adults came. The costumes cost ${cost}. How much money "
        f"was left after paying for the costumes?"
    )
    return question, [
        f"The children paid {a} * {children} = {a * children} dollars.",
        f"The adults paid {b} * {adults} = {b * adults} dollars.",
        f"Together that makes {a * children} + {b * adults} = {income} dollars.",
        f"After the costumes {income} - {cost} = {income - cost} dollars were left.",
    ]


def eggs(rng: Draw) -> Problem:
    worker, thing = rng.choice(WORKERS), rng.choice(THINGS)
    size, price, full = rng.choice([6, 8, 10, 12]), rng.randint(2, 9), rng.randint(10, 40)
    rest = rng.randrange(1, size)
    total = size * full + rest
    question = (
        f"A {worker} collects {total} {thing} and packs them in cartons of {size}. Each full "
        f"carton is sold for ${price}. How much money does the {worker} take, and how many {thing} "
        f"are left over?"
    )
    return question, [
        f"There are {total} / {size} = {full} full cartons, and {rest} {thing} are left over.",
        f"The {worker} takes {full} * {price} = {full * price} dollars.",
    ]


def ribbon(rng: Draw) -> Problem:
    name, pieces, length = rng.choice(NAMES), rng.randint(3, 9), rng.randint(15, 45)
    friends, each = rng.randint(2, 6), rng.randint(10, 60)
    total = pieces * length + friends * each
    question = (
        f"{name} has a ribbon of {total} centimetres. {name} cuts {pieces} pieces of {length} "
        f"centimetres for bows and then splits the rest equally among {friends} friends. How many "
        f"centimetres does each friend get?"
    )
    return question, [
        f"The bows take {pieces} * {length} = {pieces * length} centimetres.",
        f"The rest is {total} - {pieces * length} = {friends * each} centimetres.",
        f"Each friend gets {friends * each} / {friends} = {each} centimetres.",
    ]


def copies(rng: Draw) -> Problem:
    name, speed, count = rng.choice(NAMES), rng.choice([10, 12, 15, 20, 24, 30]), rng.randint(5, 20)
    pages = speed * rng.randint(1, 4)
    pauses, minutes = rng.randint(2, 4), rng.randint(2, 6)
    work = pages * count // speed
    question = (
        f"A printer makes {speed} pages a minute. {name} needs {count} copies of a booklet of "
        f"{pages} pages, and the printer stops {pauses} times for {minutes} minutes to cool down. "
        f"How many minutes pass until the last page is out?"
    )
    return question, [
        f"{name} needs {count} * {pages} = {count * pages} pages.",
        f"They take {count * pages} / {speed} = {work} minutes.",
        f"The stops take {pauses} * {minutes} = {pauses * minutes} minutes.",
        f"So {work} + {pauses * minutes} = {work + pauses * minutes} minutes pass.",
    ]


def ages(rng: Draw) -> Problem:
    one, other = two(rng, NAMES)
    young, more, times, years = (rng.randint(*r) for r in ((5, 14), (2, 8), (3, 4), (2, 12)))
    old = young + more
    question = (
        f"{one} is {more} years older than {other}, and their mother is {times} times as old as "
        f"{one}. {other} is {young}. How old will their mother be in {years} years?"
    )
    return question, [
        f"{one} is {young} + {more} = {old} years old.",
        f"Their mother is {old} * {times} = {old * times} years old.",
        f"In {years} years she will be {old * times} + {years} = {old * times + years} years old.",
    ]


def steps(rng: Draw) -> Problem:
    one, other = two(rng, NAMES)
    school, weekend, daily = (100 * rng.randint(*r) for r in ((40, 80), (90, 120), (30, 60)))
    mine, its = 5 * school + 2 * weekend, 7 * daily
    question = (
        f"{one} walks {school} steps on a school day and {weekend} on each day of the weekend. "
        f"{other} walks {daily} steps every day. How many more steps than {other} does {one} walk "
        f"in a week?"
    )
    return question, [
        f"On school days {one} walks 5 * {school} = {5 * school} steps.",
        f"At the weekend {one} walks 2 * {weekend} = {2 * weekend} steps, {mine} in the week.",
        f"{other} walks 7 * {daily} = {its} steps in the week.",
        f"The difference is {mine} - {its} = {mine - its} steps.",
    ]


def sale(rng: Draw) -> Problem:
    good, price, percent = rng.choice(GOODS), 20 * rng.randint(2, 20), rng.choice([10, 20, 25, 50])
    off = price * percent // 100
    count = rng.randint(2, 5)
    question = (
        f"A {good} is priced at ${price}. In the sale it is {percent}% cheaper. How much do "
        f"{count} of them cost in the sale?"
    )
    return question, [
        f"The {good} is {price} * {percent} / 100 = {off} dollars cheaper.",
        f"In the sale it costs {price} - {off} = {price - off} dollars.",
        f"So {count} of them cost {count} * {price - off} = {count * (price - off)} dollars.",
    ]


def pages(rng: Draw) -> Problem:
    name, first, more = rng.choice(NAMES), rng.randint(12, 40), rng.randint(3, 10)
    second, third = first + more, first + 2 * more
    read = first + second + third
    whole = read + rng.randint(10, 150)
    question = (
        f"{name} reads {first} pages on the first day and {more} pages more each day than on the "
        f"day before. The book has {whole} pages. How many pages are left after 3 days?"
    )
    return question, [
        f"On the second day {name} reads {first} + {more} = {second} pages.",
        f"On the third day {name} reads {second} + {more} = {third} pages.",
        f"In 3 days that makes {first} + {second} + {third} = {read} pages.",
        f"So {whole} - {read} = {whole - read} pages are left.",
    ]


def recipe(rng: Draw) -> Problem:
    name, a, times = rng.choice(NAMES), rng.randint(2, 6), rng.randint(2, 5)
    grams = 25 * rng.randint(2, 20)
    has = 25 * rng.randint(1, grams * times // 25 - 1)
    what = rng.choice(words("rice flour sugar butter oats lentils"))
    question = (
        f"A recipe for {a} people needs {grams} grams of {what}. {name} cooks for {a * times} "
        f"people and already has {has} grams of {what}. How many more grams of {what} must "
        f"{name} buy?"
    )
    return question, [
        f"{name} cooks {a * times} / {a} = {times} times the recipe.",
        f"That needs {times} * {grams} = {times * grams} grams of {what}.",
        f"So {name} must buy {times * grams} - {has} = {times * grams - has} grams.",
    ]


def wages(rng: Draw) -> Problem:
    name, worker, pay = rng.choice(NAMES), rng.choice(WORKERS), rng.randint(8, 30)
    hours, days, spent = rng.randint(4, 9), rng.randint(3, 6), rng.randint(20, 90)
    total = pay * hours * days
    question = (
        f"{name} works as a {worker} and earns ${pay} an hour, {hours} hours a day and {days} days "
        f"a week. {name} spends ${spent} a week on the bus. How much is left after 2 weeks?"
    )
    return question, [
        f"In a week {name} works {hours} * {days} = {hours * days} hours.",
        f"That pays {hours * days} * {pay} = {total} dollars.",
        f"After the bus {total} - {spent} = {total - spent} dollars are left.",
        f"In 2 weeks that makes 2 * {total - spent} = {2 * (total - spent)} dollars.",
    ]


def sharing(rng: Draw) -> Problem:
    one, other = two(rng, NAMES)
    thing, each, friends, gives = rng.choice(THINGS), *(rng.randint(3, 12) for _ in range(3))
    rest = rng.randint(1, 9)
    total = each * friends + gives + rest
    question = (
        f"{one} has {total} {thing}. {one} gives {gives} of them to {other} and {each} to each of "
        f"{friends} friends. How many {thing} does {one} keep?"
    )
    return question, [
        f"The friends get {friends} * {each} = {friends * each} {thing}.",
        f"Together {one} gives away {friends * each} + {gives} = {friends * each + gives} {thing}.",
        f"So {one} keeps {total} - {friends * each + gives} = {rest} {thing}.",
    ]


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    packed, saving, carriages, rows_of_plants, three_days, together, tank, tickets, eggs, ribbon,
    copies, ages, steps, sale, pages, recipe, wages, sharing,
)  # fmt: skip


def problems(seed: int) -> Iterator[str]:
    """Problems without end: question, blank line, "Answer: " and its sentences, line end."""
    rng = random.Random(seed)
    while True:
        question, sentences = rng.choice(TEMPLATES)(rng)
        yield f"{question}\n\nAnswer: {' '.join(sentences)}\n"
