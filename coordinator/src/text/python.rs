//! What templates expect of Python and minijinja does otherwise: how numbers are written, `json.dumps`,
//! `strftime`, backward slices, and a tag that only training knows.
//!
//! Pure; the time is an argument.

use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value, escape_formatter};
use minijinja_contrib::pycompat::unknown_method_callback;
use std::fmt::Write;

/// What `[::-1]` is rewritten to.
const REVERSED: &str = "__reversed__";

/// Rewrites a template's source where minijinja has no place to plug in. What is outside of tags stays
/// as it is.
///
/// - `{% generation %}` and `{% endgeneration %}` mark the assistant's words for training. An `if` that
///   always holds trims the same white space and changes nothing else.
/// - `[::-1]` panics in minijinja 3.0.5 where there is nothing to reverse; a method does not.
pub(super) fn source(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        output.push_str(before);
        let length = match tag.get(..2) {
            Some("{#") => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some("{{" | "{%") => code_length(tag),
            _ => 1,
        };
        let (tag, after) = tag.split_at(length);
        if tag.starts_with("{%") || tag.starts_with("{{") {
            rewrite(tag, &mut output);
        } else {
            output.push_str(tag);
        }
        rest = after;
    }
    output + rest
}

/// Bytes of the tag that `tag` starts with. Its end may stand in quotes inside of it.
fn code_length(tag: &str) -> usize {
    let end = if tag.starts_with("{{") { "}}" } else { "%}" };
    let mut quote = None;
    let mut chars = tag.char_indices().skip(2);
    while let Some((at, c)) = chars.next() {
        match (quote, c) {
            (Some(_), '\\') => drop(chars.next()),
            (Some(open), c) if open == c => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, _) if tag[at..].starts_with(end) => return at + 2,
            _ => {}
        }
    }
    tag.len()
}

fn rewrite(tag: &str, output: &mut String) {
    let word = tag.trim_matches(|c: char| c.is_whitespace() || "{%-+}".contains(c));
    match word {
        "generation" => output.push_str(&tag.replace(word, "if true")),
        "endgeneration" => output.push_str(&tag.replace(word, "endif")),
        _ => output.push_str(&tag.replace("[::-1]", &format!(".{REVERSED}()"))),
    }
}

/// Methods of Python's texts, lists and mappings.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if name != REVERSED {
        return unknown_method_callback(state, value, name, args);
    }
    if let Some(text) = value.as_str() {
        return Ok(text.chars().rev().collect::<String>().into());
    }
    let mut items: Vec<Value> = value.try_iter()?.collect();
    items.reverse();
    Ok(items.into())
}

/// How `{{ value }}` is written.
pub(super) fn format(
    output: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    if value.kind() == ValueKind::Number
        && !value.is_integer()
        && let Ok(number) = f64::try_from(value.clone())
    {
        return output.write_str(&float(number)).map_err(Error::from);
    }
    escape_formatter(output, state, value)
}

/// `value is iterable`; in minijinja none is.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// `repr` of a float: the shortest digits, with an exponent below 0.0001 and from 10^16 on.
fn float(number: f64) -> String {
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return if number.is_nan() {
            "nan".into()
        } else {
            scientific
        };
    };
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{number:?}"),
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`; minijinja's
/// own filter is for HTML and escapes `<`, `>`, `&` and `'`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands keyword arguments over by value"
)]
pub(super) fn tojson(value: &Value, args: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = args.get("indent")?;
    let sort_keys: Option<bool> = args.get("sort_keys")?;
    let separators: Option<Serde<(String, String)>> = args.get("separators")?;
    let ensure_ascii: Option<bool> = args.get("ensure_ascii")?;
    args.assert_all_used()?;
    let style = JsonStyle {
        indent,
        sort_keys: sort_keys == Some(true),
        ensure_ascii: ensure_ascii == Some(true),
        separators: match separators {
            Some(Serde(pair)) => pair,
            // With an indent Python ends lines without a space.
            None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
            None => (", ".to_owned(), ": ".to_owned()),
        },
    };
    let json = serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, "cannot be written as JSON").with_source(error)
    })?;
    let mut text = String::new();
    style.write(&json, 0, &mut text);
    Ok(text)
}

struct JsonStyle {
    indent: Option<usize>,
    sort_keys: bool,
    ensure_ascii: bool,
    separators: (String, String),
}

impl JsonStyle {
    fn write(&self, value: &serde_json::Value, depth: usize, text: &mut String) {
        use serde_json::Value as Json;
        match value {
            Json::Array(items) if !items.is_empty() => {
                text.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(i, depth + 1, text);
                    self.write(item, depth + 1, text);
                }
                self.break_line(depth, text);
                text.push(']');
            }
            Json::Object(map) if !map.is_empty() => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                text.push('{');
                for (i, (key, item)) in entries.into_iter().enumerate() {
                    self.separate(i, depth + 1, text);
                    self.write_text(key, text);
                    text.push_str(&self.separators.1);
                    self.write(item, depth + 1, text);
                }
                self.break_line(depth, text);
                text.push('}');
            }
            Json::String(words) => self.write_text(words, text),
            Json::Number(number) if number.is_f64() => {
                text.push_str(&float(number.as_f64().unwrap_or_default()));
            }
            leaf => text.push_str(&leaf.to_string()),
        }
    }

    fn write_text(&self, words: &str, text: &mut String) {
        let quoted = serde_json::Value::from(words).to_string();
        if !self.ensure_ascii {
            text.push_str(&quoted);
            return;
        }
        let mut units = [0; 2];
        for c in quoted.chars() {
            if c.is_ascii() {
                text.push(c);
            } else {
                for unit in c.encode_utf16(&mut units) {
                    write!(text, "\\u{unit:04x}").expect("writing to a String cannot fail");
                }
            }
        }
    }

    fn separate(&self, index: usize, depth: usize, text: &mut String) {
        if index > 0 {
            text.push_str(&self.separators.0);
        }
        self.break_line(depth, text);
    }

    fn break_line(&self, depth: usize, text: &mut String) {
        if let Some(indent) = self.indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// `strftime` over seconds since 1970 for the directives templates use; others stay as written.
pub(super) fn strftime(seconds: u64, format: &str) -> String {
    let days = seconds / 86_400;
    let weekday = DAYS[usize::try_from(days % 7).unwrap_or(0)];
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month - 1];
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let piece = match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') | None => "%".to_owned(),
            Some(other) => format!("%{other}"),
        };
        text.push_str(&piece);
    }
    text
}

/// Year, month (1 to 12) and day (1 to 31) of a day counted from 1970-01-01.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let mut year = 1970;
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_in_python() {
        for (number, text) in [
            (0.0, "0.0"),
            (-1.5, "-1.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1e300, "1e+300"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(float(number), text);
        }
    }

    #[test]
    fn only_code_is_rewritten() {
        for (from, to) in [
            ("{% generation %}[::-1]", "{% if true %}[::-1]"),
            ("{%- endgeneration -%}", "{%- endif -%}"),
            ("{{ x[::-1].y }}", "{{ x.__reversed__().y }}"),
            ("{{ '}}' ~ x[::-1] }} {", "{{ '}}' ~ x.__reversed__() }} {"),
            ("{# x[::-1] #}{ x[::-1] }", "{# x[::-1] #}{ x[::-1] }"),
            ("{% if x %}{% generati", "{% if x %}{% generati"),
            ("{{ \"\\\"}}\" }}{", "{{ \"\\\"}}\" }}{"),
        ] {
            assert_eq!(source(from), to);
        }
    }

    #[test]
    fn dates_are_right_at_the_edges() {
        assert_eq!(
            strftime(0, "%A %d %B %Y %H:%M:%S"),
            "Thursday 01 January 1970 00:00:00"
        );
        assert_eq!(strftime(951_782_400, "%a %F"), "Tue 2000-02-29");
        assert_eq!(strftime(951_868_800, "%e %b %y"), " 1 Mar 00");
        assert_eq!(
            strftime(4_107_542_399, "%F %T %I %p"),
            "2100-02-28 23:59:59 11 PM"
        );
        assert_eq!(strftime(4_107_542_400, "%F%%%Q"), "2100-03-01%%Q");
    }
}
