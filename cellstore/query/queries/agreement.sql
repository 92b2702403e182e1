-- How far people agree who labelled the same cells, images, wells or plates: a row for each two
-- of them. kappa is Cohen's (1960): 0 is what chance alone gives, 1 is full agreement. It is null
-- where both gave one and the same label to all, which chance explains as well.
-- :field (text) = nothing  Only this field.
WITH pairs AS (
    SELECT
        a.field, a.level, a.user_name AS first, b.user_name AS second,
        a.label AS first_says, b.label AS second_says
    FROM current_labels AS a
    JOIN current_labels AS b ON b.level = a.level AND b.row_id = a.row_id AND b.field = a.field
    WHERE a.user_name < b.user_name AND ($field IS NULL OR a.field = $field)
),
labels_of AS (
    SELECT
        field, level, first, second, label,
        count(*) FILTER (WHERE who = 1) AS first_n, count(*) FILTER (WHERE who = 2) AS second_n
    FROM (
        SELECT * EXCLUDE (first_says, second_says), first_says AS label, 1 AS who FROM pairs
        UNION ALL
        SELECT * EXCLUDE (first_says, second_says), second_says, 2 FROM pairs
    )
    GROUP BY ALL
),
chance AS (
    SELECT
        field, level, first, second,
        CAST(sum(first_n * second_n) AS DOUBLE) / (sum(first_n) * sum(second_n)) AS by_chance
    FROM labels_of
    GROUP BY ALL
),
agreed AS (
    SELECT
        field, level, first, second, count(*) AS both,
        avg(CAST(first_says = second_says AS DOUBLE)) AS agreement
    FROM pairs
    GROUP BY ALL
)
SELECT
    a.field, a.level, a.first, a.second, a.both, a.agreement, c.by_chance,
    CASE WHEN c.by_chance < 1 THEN (a.agreement - c.by_chance) / (1 - c.by_chance) END AS kappa
FROM agreed AS a
JOIN chance AS c
    ON c.field = a.field AND c.level = a.level AND c.first = a.first AND c.second = a.second
ORDER BY a.field, a.level, a.first, a.second
