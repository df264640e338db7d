r"""(right answer, prediction, whether they are the same): what README.md of `answers` promises, case by case."""

from __future__ import annotations

SAME = [
    # numbers
    ("18", "18"), ("18", " 18 "), ("18", "18."), ("18", "18.0"), ("18", "18.00"), ("18", "+18"), ("-3", "\u22123"),
    ("-3", "- 3"), ("05", "5"), ("0", "-0"), ("1,000", "1000"), ("1000", "1,000.00"), ("12,345,678", "12345678"),
    ("1{,}000", "1000"), (".5", "0.5"), ("0.50", "0.5"), ("1e3", "1000"), ("1.5e-2", "0.015"),
    (r"3 \times 10^3", "3000"), (r"3\cdot 10^{-2}", "0.03"), ("1000000", "10^6"), (r"2^{10}", "1024"), ("5!", "120"),
    (r"100\,000", "100000"),
    # fractions and mixed numbers
    ("1/2", "0.5"), (r"\frac{1}{2}", "1/2"), (r"\dfrac{1}{2}", r"\frac12"), (r"\tfrac{3}{4}", "0.75"),
    ("2/4", "1/2"), ("-1/2", r"-\frac{1}{2}"), (r"\frac{-1}{2}", "-0.5"), (r"1\frac{1}{2}", "1.5"), ("1 1/2", "3/2"),
    (r"-1\frac{1}{2}", "-1.5"), (r"\frac{6}{3}", "2"), ("10/4", "2.5"), (r"\frac{1.5}{3}", "0.5"), ("1:2", "1/2"),
    # percent
    ("50%", "50%"), (r"50\%", "50%"), ("50%", "50"), ("50", "50%"), ("50%", "0.5"), ("0.5", "50%"), ("50%", "1/2"),
    ("12.5%", "12.5 percent"),
    # money and other units
    ("$18", "18"), (r"\$18", "18"), ("18", "$18.00"), ("18", "18 dollars"), ("$18", "18 dollars"), ("$1,200", "1200"),
    ("-$5", "-5"), ("$-5", "-5"), ("18", "18 apples"), ("18 eggs", "18"), (r"5\text{ cm}", "5"),
    ("5 cm", "5 centimeters"),
    (r"5\text{ cm}", "5 cm"), (r"10 \text{ inches}", "10in"), (r"12\,\mathrm{m}^2", "12 m^2"),
    ("3 hours", "3 h"), ("3 hours", "3"), (r"90^\circ", "90"), (r"90^{\circ}", "90 degrees"), ("90°", r"90^\circ"),
    ("25 cents", "25"), ("60 mph", "60"), ("7 days", "7 day"), ("$5 per egg", "$5"),
    # a name before the value
    ("x = 5", "5"), ("5", "x=5"), ("x=5", "x = 5"), (r"x_1 = \frac{1}{2}", "0.5"), ("y=x^2", "x^2"),
    ("(x,y)=(1,2)", "(1,2)"), ("n = 3", "n=3.0"),
    # tuples, lists, sets
    ("(1,2)", "(1, 2)"), (r"\left(1,2\right)", "(1,2)"), ("(1,2)", "1,2"), (r"(\frac12, 3)", "(0.5,3)"),
    (r"(3, \frac{\pi}{2})", r"(3,\pi/2)"), ("1,2", "2,1"), ("1, 2, 3", "3,1,2"), ("2 and 3", "3, 2"),
    (r"2 \text{ and } 3", "2,3"), (r"3\text{ or }4", "4 or 3"), (r"\{1,2\}", r"\{2,1\}"), (r"\{1,2\}", "2, 1"),
    (r"\{5\}", "5"), (r"\left\{1, 2, 3\right\}", r"\{3,2,1\}"), (r"\pm 2", "2,-2"), (r"1,\sqrt{4}", "2,1"),
    ("(1,2),(3,4)", "(3,4),(1,2)"), ("(-1, 1/3, 2)", r"(-1,\frac{1}{3},2)"), ("x=1, x=2", "1, 2"),
    # intervals and inequalities
    ("[1,2]", "[1, 2]"), ("(1,2]", r"\left(1,2\right]"), (r"[0,1)\cup(2,3]", r"(2,3]\cup[0,1)"),
    (r"(-\infty, 5)", r"(-\infty,5)"), ("[0.5, 1]", r"[\frac12,1]"), ("x<5", "5>x"), (r"x\le 5", r"x\leq 5"),
    # matrices
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix} 1/2 & 2 \end{pmatrix}", r"\begin{pmatrix} \frac12 & 2 \end{pmatrix}"),
    # expressions
    (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt{x}", "√x"),
    (r"11\sqrt2", r"11\sqrt{2}"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}"),
    (r"6\pi - 3", r"-3+6\pi"), ("x^2+2x", "x(x+2)"), ("2x+1", "1+2x"), ("(x+1)^2", "x^2+2x+1"), ("3+4i", "4i+3"),
    (r"\log_2 8", "3"), (r"\sin \frac{\pi}{6}", r"\frac12"), (r"e^{2}", "e^2"), (r"\sqrt[3]{27}", "3"),
    (r"\binom{5}{2}", "10"),
    (r"y = 2x+1", "y=1+2x"), (r"\infty", r"\infty"), (r"-\infty", r"-\infty"), (r"\frac{x}{2}", r"\frac{1}{2}x"),
    (r"\left|-3\right|", "3"), (r"2\pi", r"\pi\cdot 2"),
    # words and choices
    ("A", "(A)"), (r"\text{(A)}", "A"), ("(B)", "B."), ("C", "(C) 22"), (r"\textbf{(D)}", "D"),
    ("E", "E. all of them"),
    (r"\text{east}", "east"), ("East", "east"), (r"\text{Evelyn}", "Evelyn"), ("yes", "Yes."),
    ("no solution", "No solution"),
    (r"\text{not real}", "not real"), ("the red one", "red one"), ("twenty-five", "twenty five"),
    # around the answer
    ("$5$", "5"), (r"\(5\)", "5"), (r"\[5\]", "5"), ("5", r"\left( 5 \right)"), (r"\!\!5", "5"),
]  # fmt: skip

DIFFERENT = [
    # the released evaluation takes these for the same
    ("5", "500"), ("500", "5"), ("0.05", "500"), ("5%", "500"), ("5", "0.05"), ("100", "1"), ("1", "100"),
    # numbers
    ("18", "19"), ("18", "-18"), ("18", "180"), ("1,000", "1"), ("1000", "1,00"), ("18", ""), ("18", "   "),
    ("3.33", "10/3"),
    ("1/3", "0.333"), ("3.14", r"\pi"), ("1e3", "100"), (r"3\times 10^3", "300"), ("2", "2/0"), ("7", "7x"),
    ("7", "x"),
    # fractions and mixed numbers
    ("1/2", "2/1"), (r"\frac{1}{2}", r"-\frac12"), (r"1\frac{1}{2}", "1/2"), ("1 1/2", "11/2"), ("1/2", "12"),
    # percent
    ("50%", "5%"), ("50%", "0.05"), ("50", "0.5"), ("0.5", "50"), ("50%", "5000"),
    # units
    (r"5\text{ cm}", r"5\text{ m}"), ("5 cm", "6 cm"), ("5 cm", "5 inches"), ("18 apples", "18 oranges"),
    ("$18", "18%"),
    ("3 hours", "3 minutes"), (r"90^\circ", "90 cm"), ("18", "81 apples"), ("$5", "5 cents"),
    # names
    ("x=5", "y=5"), ("x=5", "x=6"), ("x=5", "x"), ("5", "x=6"),
    # tuples, lists, sets, intervals
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2]", "(1,2)"), ("[1,2)", "(1,2]"), ("(1,2)", "(1,2,3)"),
    ("1,2", "1,3"),
    ("1,2", "1"), ("1", "1,2"), (r"\{1,2\}", r"\{1,3\}"), (r"\{1,2\}", "(1,2)"), ("1,1", "1,2"), (r"\{5\}", "6"),
    (r"[0,1)\cup(2,3]", r"[0,1]\cup(2,3]"), (r"(-\infty,5)", r"(-\infty,5]"), ("x<5", "x>5"), ("x<5", r"x\le 5"),
    ("(1,2),(3,4)", "(1,3),(2,4)"), (r"\pm 2", "2"), ("12", "1,2"), ("1,234", "1,2,3,4"),
    # matrices
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", "1"),
    # expressions
    (r"\sqrt{8}", r"\sqrt{2}"), ("x^2+2x", "x^2-2x"), ("2x+1", "2x"), ("3+4i", "3-4i"), (r"\log_2 8", "2"),
    (r"\sqrt2", "2"), ("5", "5 and a half"), (r"\leftarrow", r"\rightarrow"),
    (r"\infty", r"-\infty"), (r"\frac{x}{2}", r"\frac{2}{x}"), (r"6\pi", "6"), ("x", "y"), (r"\sin x", r"\cos x"),
    # words and choices
    ("A", "B"), ("A", "(B)"), ("C", "(D) 22"), ("A", "22"), (r"\text{east}", "seat"), (r"\text{east}", "west"),
    ("yes", "no"),
    ("Evelyn", "Angela"), ("no solution", "5"), ("5", "no solution"), ("5", "five or so"), ("not real", "real"),
    # no mathematics, and no comparison at any price
    ("5", "{}{}{"), ("5", r"\frac{"), ("5", "???"), ("5", "(((((5"), ("5", "__import__('os').system('true')"),
    ("5", "5; 6"), ("7", r"\boxed{"),
]  # fmt: skip

# No two of them are the same.
DISTINCT = [
    "0", "1", "2", "3", "5", "-5", "18", "81", "100", "500", "1,000", "10000", "0.05", "0.33", "1/3", "2/3", "-1/3",
    r"1\frac{1}{4}", "11/4", "7%", "700", "$19", "6 cm", "6 km", "90.5", "1e-3", r"3\times 10^5", r"\pi", "3.14",
    "3.1416",
    r"2\pi", r"\sqrt{2}", "1.41", r"2\sqrt{2}", r"\sqrt[3]{2}", r"\frac{\pi}{2}", "e", "i", "2i", "3+4i", "3-4i",
    r"\infty",
    r"-\infty", "x", "y", "2x", "x^2", "x^2+1", "x^2-1", "x+1", r"\frac{1}{x}", r"\sin x", r"\cos x", "x<5",
    r"x\le 5",
    "x>5", "(4,7)", "(7,4)", "[4,7]", "(4,7]", "[4,7)", r"\{4,8\}", "(4,7,8)", r"(-\infty,4)", r"[0,1)\cup(2,3]",
    r"[0,1]\cup(2,3]", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}",
    r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", "(A)", "(B)", "(C)", "yes", "no",
    "east",
    "seat", "west", "no solution", "Evelyn", "Angela", "2 and 9", "9, 2, 2", r"\pm 6", "12:30", r"\log 2", "10!",
    "x=13",
    r"5\cdot 11", r"\binom{7}{3}", r"\emptyset", "ab", "a+b", "a-b", r"\frac{a}{b}", r"|x|", "x^3+x", r"2^{100}",
    "22 apples", "23 oranges", "24 hours", "26 minutes", "27 dollars", "28°", "0.999", "0.9999",
]  # fmt: skip
