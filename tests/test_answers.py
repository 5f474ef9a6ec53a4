"""Answers of generated texts: found in any form that models write, compared by value."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.answers import extract_answer, same_answer

EXTRACTED = {
    "number": [
        ("She has 5 cats.\n#### 1,234", "1234"),
        ("#### $-3.50 ", "-3.50"),
        ("#### 18\nQuestion: 7 dogs", "18"),
        ("5 + 4\n#### 9\nTom has 3 dogs and 4 cats", "9"),
        ("#### 9\n\nQuestion: x\nAnswer: 3 #### 12", "9"),
        ("The answer is 8.\n\nQ: 7 dogs? A: the answer is 9", "8"),
        ("#### Step 1: add\n3 + 4 = 7\n#### Step 2\nThe answer is 18", "18"),
        ("#### 1. Add\nwe get\n#### 2. Sum\n\nThe answer is 18", "18"),
        ("<think>Is the answer 7? \\boxed{7}</think>It is 8", "8"),
        ("maybe 8 </think> so 9", "9"),  # the template opened the thought
        ("<think>It could be 7", ""),
        (r"\boxed{\frac{-1}{2}}", "-1/2"),
        (r"\boxed{\frac{1}{-2}}", "-1/2"),
        (r"\boxed{-\frac{-1}{2}}", "1/2"),
        (r"\boxed{-1\frac12}", "-1 1/2"),
        ("The answer is 18. She sold 3.", "18"),
        ("The answer is 5? No, the answer is 6, not 7.", "6"),
        ("The answer is 18. To check: 3 * 6 = 19.", "18"),
        ("The answer is 3 + 4 = 7 dollars for 2 days.", "7"),
        ("So 2 + 2 = 4. The final answer is:\n\n**4**", "4"),
        ("**Answer:** 5 of 7", "5"),
        ("The answer to the question is 12 apples", "12"),
        ("First 3, so the answer is clear: he pays 20", "20"),
        ("The answer is obvious. He pays $20.", "20"),
        (r"Adding, \boxed{18\text{ of } 20} and 7", "18"),
        (r"$\boxed{1\frac{1}{2}}$ hours", "1 1/2"),
        (r"It is $\$1{,}234$", "1234"),
        (r"\boxed{1,\!234,\!567}", "1234567"),
        (r"\boxed{25\%}", "25%"),
        ("a 10-5", "5"),
        ("共-5度", "-5"),
        ("at −5", "-5"),
        ("答案是5元，不是6元。", "5"),
        ("所以答案应该是：(3/8)", "3/8"),
        ("答：一共5元，3人。", "5"),
        ("25％", "25%"),
        ("half, .5.", ".5"),
        ("1, 2, 3", "3"),
        ("11,12", "12"),
        ("none", ""),
        ("1/0", "0"),
    ],
    "math": [
        (r"so $\boxed{1}$, no, $\boxed{\frac{1}{\sqrt{2}}}$ or 3", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"is $\boxed 5$.", "5"),
        (r"is \fbox{5}.", "5"),
        (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("The answer is 0.5.", "0.5"),
        ("所以答案是$x^2$。谢谢", "x^2"),
        (r"Cut off: the answer is 7, \boxed{7", "7, \\boxed{7"),
        ("5", "5"),
        ("", ""),
    ],
    "choice": [
        ("The answer is (B).", "B"),
        ("Answer: C.", "C"),
        ("**Answer:** D", "D"),
        ("The correct answer is: **B. Paris**", "B"),
        ("The correct option is (c)", "C"),
        ("The answer is option D", "D"),
        ("I think A or B; the answer is B because A is cold.", "B"),
        ("The answer is A because dogs bark.", "A"),
        ("The answer is A.", "A"),
        ("The answer is A dog.", ""),
        ("A dog barks.", ""),
        ("Answer: I guess so", ""),
        ("Answer: Ann", ""),
        ("B", "B"),
        ("B. The heart of A", "B"),
        ("C) Paris\n(A) is wrong", "C"),
        ("D\nExplanation: (A) is wrong.", "D"),
        ("(A) is cold. (B) is hot.", "B"),
        (r"Thus $\boxed{\text{(D)}}$, not (A)", "D"),
        ("答案是B", "B"),
        ("因此正确答案为：（C）。", "C"),
        ("故选：D。", "D"),
        ("所以选择A项，A正确", "A"),
        ("答案选项是C", "C"),
        ("I do not know.", ""),
        ("**B**", "B"),
        ("__C__", "C"),
        ("I would choose **D**", "D"),
        ("B is the correct answer.", "B"),
        ("Option C is correct, A is not.", "C"),
        ("A is incorrect. B is right.", "B"),
        ("the answer is b", "B"),
        ("The answer is **b**.", "B"),
        ("The answer is a.", "A"),
        ("The answer is a dog.", ""),
        ("b", "B"),
        ("b) Paris", "B"),
        ("so (b)", "B"),
        (r"\boxed{b}", "B"),
        ("B\n\nQuestion: next\nAnswer: C", "B"),
        ("<think>A or B?</think>\n\nC", "C"),
    ],
    "yes_no": [
        ("<think>No?</think> Yes", "yes"),
        ("There is no doubt that cats purr. So the answer is yes.", "yes"),
        ("Yes, there is no doubt.", "yes"),
        ("No\n", "no"),
        ("No one knows all. Still, yes.", "yes"),
        ("Answer: True", "yes"),
        ("it is **False**", "no"),
        ("Nobody knows yesterday.", ""),
    ],
    "text": [
        ("Let us think. So the answer is (B).", "(B)"),
        ("the answer is apple banana.\n\nQ: next", "apple banana"),
        ("Reasons.\nvalid.", "valid"),
        ("The answer is St. Ives.", "St. Ives"),
        (r"\boxed{24}", "24"),
        ("Answer: ] ) >", "] ) >"),
        ("", ""),
    ],
}


@pytest.mark.parametrize(
    ("kind", "text", "answer"), [(k, *pair) for k, pairs in EXTRACTED.items() for pair in pairs]
)
def test_the_answer_of_a_text(kind, text, answer):
    assert extract_answer(kind, text) == answer
    assert same_answer(kind, answer, extract_answer(kind, answer)) == bool(
        answer
    )  # an answer answers itself
    assert not same_answer(kind, answer, "")


PIECES = r"answer is: 答案是 #### \boxed{ \boxed } { ( ) (B) A 选 yes no x \ \frac{1}{2} 1 0 - . , / % $ = \!".split()
PIECES += [" ", "\n"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES)).map("".join),
)
def test_no_text_is_too_strange_and_sameness_has_no_sides(one, two):
    for kind in EXTRACTED:
        a, b = extract_answer(kind, one), extract_answer(kind, two)
        assert same_answer(kind, a, b) == same_answer(kind, b, a)
        if kind in ("number", "choice", "yes_no"):
            assert extract_answer(kind, a) == a
            assert same_answer(kind, a, a) == bool(a)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(1, 400))
def test_a_number_is_the_same_however_it_is_written(whole, parts):
    number = f"{whole}/{parts}"
    assert extract_answer("number", f"It is {whole:,} by 7.\n#### {whole:,}") == str(whole)
    for kind in ("number", "math"):
        assert same_answer(kind, number, f"{3 * whole}/{3 * parts}")
        assert not same_answer(kind, number, f"{whole + 1}/{parts}")
        assert same_answer(kind, str(whole), f"{whole:,}.00")
        assert same_answer(kind, f"{whole / 8}", f"{whole}/8")
    latex = rf"{'-' * (whole < 0)}\frac{{{abs(whole)}}}{{{parts}}}"
    assert same_answer("math", number, latex)
    assert same_answer("number", number, extract_answer("number", rf"is $\boxed{{{latex}}}$"))


NESTED = st.recursive(
    st.sampled_from(["x", "1", r"\{", r"\\", " ", r"\pi"]),
    lambda inner: st.one_of(inner.map("{{{}}}".format), st.tuples(inner, inner).map("".join)),
)


@settings(max_examples=100, deadline=None)
@given(NESTED, NESTED)
def test_a_box_holds_whatever_is_balanced(first, last):
    text = rf"So $\boxed{{{first}}}$ and $\boxed{{{last}}}$, where {{x}} is 1."
    if last.strip():
        assert extract_answer("math", text) == last.strip()


SAME = [
    ("number", "50%", "50", True),
    ("number", "50%", "0.5", True),
    ("number", "50%", "1/2", True),
    ("number", "50", "0.5", False),
    ("number", "150%", "1(1/2)", True),
    ("number", "-1 1/2", "-1.5", True),
    ("number", "0.33", "1/3", False),
    ("number", "$1,000.00", "1000", True),
    ("number", "1000", "100", False),
    ("number", "9" * 9999, "9", False),
    ("math", r"\dfrac12", r"\frac{1}{2}", True),
    ("math", r"\tfrac{3}4", "0.75", True),
    ("math", r"\frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}", True),
    ("math", r"\left( 1, \frac12 \right]", r"(1,\frac{1}{2}]", True),
    ("math", "(1,234)", "1234", False),
    ("math", "(1,2)", "(2,1)", False),
    ("math", "12{,}345", r"12,\!345", True),
    ("math", r"$5\text{ cm}^2$", "5", True),
    ("math", r"5\ \mathrm{cm}", "5.", True),
    ("math", r"\text{east}", "east", True),
    ("math", r"\text{even}", r"\text{odd}", False),
    ("math", r"90^\circ", "90", True),
    ("math", r"x = \sqrt 2", r"\sqrt{2}", True),
    ("math", "y=x+1", "x+1", True),
    ("math", ".5", "0.5", True),
    ("math", r"50\%", "50", True),
    ("math", r"\$50", "50", True),
    ("math", "3 1/2", "31/2", False),
    ("math", r"3\frac{1}{2}", "3.5", True),
    ("math", r"\leftarrow", "arrow", False),
    ("math", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    ("math", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}", False),
    ("math", "-2", "2", False),
    ("math", r"\frac{-3}{4}", r"-\frac{3}{4}", True),
    ("math", r"\frac{3}{-4}", "-0.75", True),
    ("math", r"\frac{-\sqrt{3}}{2}", r"-\frac{\sqrt3}{2}", True),
    ("math", r"\frac{-x+1}{2}", r"-\frac{x+1}{2}", False),
    ("math", r"10\text{ AM}", r"10\text{ PM}", False),
    ("math", r"10\text{ AM}", "10 a.m.", True),
    ("math", r"5\text{ million}", "5", False),
    ("choice", "(b)", "B", True),
    ("choice", "A", "B", False),
    ("yes_no", "Yes", "yes", True),
    ("text", "(A)", "a", True),
    ("text", "Apple  banana.", "apple banana", True),
    ("text", "The Cat", "cat", False),
    ("text", "( )", "( ) )", False),
    ("text", ") ]", "] )", False),
]


@pytest.mark.parametrize(("kind", "one", "two", "same"), SAME)
def test_what_is_the_same_answer(kind, one, two, same):
    assert same_answer(kind, one, two) is same
    assert same_answer(kind, two, one) is same


@pytest.mark.parametrize(
    "function", [extract_answer, lambda kind, text: same_answer(kind, text, text)]
)
def test_an_unknown_kind_of_answer_is_named(function):
    with pytest.raises(
        ValueError, match="kind 'letter': expected one of number, math, choice, yes_no, text"
    ):
        function("letter", "A")
