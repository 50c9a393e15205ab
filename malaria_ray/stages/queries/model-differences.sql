-- How much better or worse these results are than the others that 'evaluate --against' compared them with, by paired
-- intervals; a difference whose interval holds 0 may be chance.
SELECT
    results, model, against_model, metric, value, against_value, difference, ci_low, ci_high,
    ci_low > 0 OR ci_high < 0 AS is_beyond_chance, n
FROM differences
ORDER BY results, metric;
