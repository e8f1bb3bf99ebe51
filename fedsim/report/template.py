"""The page: what a reader without the code needs, in the order they need it.

Jinja with autoescape: titles, names and messages come from scenarios and clients and are not
trusted.  It lives in a module because Flower's app bundle carries no HTML files.
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ report.title }} · FedSim report</title>
<style>{{ style }}</style>
</head>
{% macro pair_list(pairs) %}
<ul class="pairs">
{% for pair in pairs %}
<li><figure>
<div class="both">
<img src="{{ pair.truth }}" alt="private image {{ pair.example.index }} of client \
{{ pair.example.client }}, class {{ pair.label }}">
{% if pair.recovered %}
<img src="{{ pair.recovered }}" alt="reconstruction, PSNR {{ pair.example.psnr | decibel }}, \
{{ 'leaked' if pair.example.leaked else 'not leaked' }}">
{% else %}<div class="none">no candidate</div>{% endif %}
</div>
<figcaption>
<span><b class="badge {{ 'leaked' if pair.example.leaked else 'safe' }}">\
{{ 'leaked' if pair.example.leaked else 'not leaked' }}</b>\
{% if pair.recovered %} <strong>{{ pair.example.psnr | decibel | unbroken }}</strong>{% endif %}\
</span>
{% if pair.recovered %}<span>SSIM {{ '%.2f' | format(pair.example.ssim) }}\
{% if pair.example.lpips is not none %}, LPIPS {{ '%.2f' | format(pair.example.lpips) }}\
{% endif %}</span>{% endif %}
<span>client {{ pair.example.client }}, image {{ pair.example.index }}</span>
<span>{{ pair.label }}</span>
</figcaption>
</figure></li>
{% endfor %}
</ul>
{% endmacro %}
<body>
<header>
<p class="kind">FedSim report · {{ report.run }}</p>
<h1>{{ report.title }}</h1>
</header>
<main>

<section class="verdict {{ mood }}" aria-labelledby="verdict">
<h2 id="verdict">Verdict</h2>
<p>{{ report.verdict | unbroken }}</p>
{% for oracle in report.threat_model.oracles %}
<span class="badge oracle">oracle: {{ oracle }}</span>
{% endfor %}
{% if leak %}
{{ bar }}
<p class="quiet">Bar: share of private images that came back; whisker: 95 % interval\
{% if leak.floor %}; dashed line: what a guess gets{% endif %}.</p>
<dl class="facts">
<div><dt>Typical closeness</dt><dd>{{ leak.psnr.median | decibel }}\
<small>median PSNR; {% if leak.floor %}a guess gets \
{{ leak.floor.psnr.median | decibel | unbroken }}\
{% else %}no guess to compare with{% endif %}</small></dd></div>
<div><dt>Back exactly</dt><dd>{{ leak.exact | count }}<small>of \
{{ leak.private_examples | count }} images, within rounding</small></dd></div>
<div><dt>Labels recovered</dt><dd>{% if leak.label_accuracy is none %}none{% else %}\
{{ leak.label_accuracy | share }}{% endif %}\
<small>{{ leak.label_accuracy_reason or 'as counts of each class' }}</small></dd></div>
<div><dt>Accuracy after training</dt><dd>{{ accuracy.after | share }}\
<small>{% if accuracy.baseline_after is not none %}without attack and defenses \
{{ accuracy.baseline_after | share }}{% else %}before {{ accuracy.before | share }}{% endif %}\
</small></dd></div>
</dl>
{% else %}
<dl class="facts">
{% if report.membership %}
<div><dt>Accuracy of the attack</dt><dd>{{ report.membership.accuracy | share }}\
<small>a guess gets {{ report.membership.guess | share }}</small></dd></div>
<div><dt>Precision</dt><dd>{{ report.membership.precision | share }}\
<small>of the cases in which it said the image is there</small></dd></div>
<div><dt>Recall</dt><dd>{{ report.membership.recall | share }}\
<small>of the cases in which it was there</small></dd></div>
{% endif %}
<div><dt>Rounds done</dt><dd>{{ federation.rounds_done | count }}\
<small>of {{ federation.rounds | count }}, with {{ federation.clients | count }} clients</small>\
</dd></div>
<div><dt>Accuracy before training</dt><dd>{{ accuracy.before | share }}</dd></div>
<div><dt>Accuracy after training</dt><dd>{{ accuracy.after | share }}</dd></div>
</dl>
{% endif %}
{% for note in report.notes %}<p class="alarm">Note: {{ note }}.</p>{% endfor %}
</section>

<section aria-labelledby="who">
<h2 id="who">Who knew what</h2>
<p>Threat model <strong>{{ report.threat_model.letter }}</strong>, \
{{ report.threat_model.name }}.
{% if report.attack %}The attack is <strong>{{ report.attack.name }}</strong>\
{% if report.attack.paper %} ({{ report.attack.paper }}){% endif %}.
{% else %}The server made no attack that is judged here.{% endif %}</p>
<div class="table" tabindex="0" role="region" aria-label="Capabilities">
<table>
<caption>What the adversary was granted, and what the attack really asked for</caption>
<thead><tr><th scope="col">Capability</th><th scope="col">Granted</th><th scope="col">Used</th>\
</tr></thead>
<tbody>
{% for name, meaning in capabilities.items() %}
{% set granted = name in report.threat_model.granted %}
{% set used = name in report.threat_model.used %}
<tr{% if not granted %} class="no"{% endif %}><th scope="row">{{ name }} \
<span class="quiet meaning">{{ meaning }}</span></th>\
<td>{{ 'yes' if granted else 'no' }}</td>\
<td>{{ 'yes' if used else 'no' if granted else '–' }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if report.threat_model.oracles %}
<p class="alarm">Beyond any threat model, the attack was given: \
<strong>{{ report.threat_model.oracles | join(', ') }}</strong>. Such oracles flatter an attack: \
no server has them in life.</p>
{% endif %}
<h3>What reached the server</h3>
{% if report.attack and not report.attack.reconstruction %}
<p>Nothing: {{ report.leak_reason }}.</p>
{% elif unmasked %}
<p>The channel <strong>{{ channel_name }}</strong> should let the server read only sums over \
several clients. This server broke its protocol and read single clients' uploads: \
{{ unmasked | join(', ') }}.</p>
{% elif aggregated or hides %}
<p>The channel <strong>{{ channel_name }}</strong> let the server read only sums over several \
clients, never one client's upload. This protects against an honest-but-curious server only: one \
that changes the model it sends, or picks who takes part, can still reach single clients through \
a sum.</p>
{% elif channel_name == 'plain' %}
<p>Each client's upload by itself (channel <strong>plain</strong>).</p>
{% else %}
<p>Each client's upload by itself, through the channel <strong>{{ channel_name }}</strong>.</p>
{% endif %}
</section>

{% if leak %}
<section aria-labelledby="pairs">
<h2 id="pairs">What came back</h2>
<p>On the left what a client held, on the right what the attack made of the updates. Each \
private image is matched with at most one reconstruction, and counts once.</p>
<h3>The worst leaks</h3>
<p class="quiet">The {{ pairs.worst | length }} private images that came back closest, of \
{{ leak.private_examples | count }}.</p>
{{ pair_list(pairs.worst) }}
<h3>A random sample</h3>
<p class="quiet">{{ pairs.sample | length }} private images drawn at random, whatever the attack \
did to them: a fair impression.</p>
{{ pair_list(pairs.sample) }}
</section>

<section aria-labelledby="close">
<h2 id="close">How close it came</h2>
<div class="charts">
<figure>{{ psnr_figure }}<figcaption>PSNR is closeness pixel by pixel, in decibels: 10 looks \
unrelated, 20 is recognizable, 30 is clear, above 60 it is the image itself. \
{{ dashed }}</figcaption></figure>
<figure>{{ ssim_figure }}<figcaption>SSIM is likeness of structure: 1 is identical, 0 has nothing \
in common. {{ dashed }}</figcaption></figure>
<figure>{{ curve_figure }}<figcaption>How many private images count as leaked, depending on how \
close one asks for.{% if leak.floor %} Dashed: the same for the guess.{% endif %}</figcaption>\
</figure>
</div>
<div class="table" tabindex="0" role="region" aria-label="Metrics">
<table>
<caption>Every metric for each image, then summed up over the {{ leak.matched | count }} matched \
images</caption>
<thead><tr><th scope="col">Metric</th><th scope="col" class="number">Mean</th>\
<th scope="col" class="number">Median</th><th scope="col" class="number">Best</th>\
<th scope="col" class="number">Guess, mean</th></tr></thead>
<tbody>
{% for row in metric_rows %}
<tr><th scope="row">{{ row.title }}<br><span class="quiet">{{ row.meaning }}</span></th>
{% if row.reason %}<td colspan="4" class="no">not computed: {{ row.reason }}</td>
{% else %}<td class="number">{{ row.mean }}</td><td class="number">{{ row.median }}</td>\
<td class="number">{{ row.best }}</td><td class="number">{{ row.guess }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if leak.floor %}
<p>The guess is an attacker who never looks at the updates and makes as many guesses as the \
attack made. Of three, the one that leaks most by this run's criterion stands for it: \
<strong>{{ leak.floor.guess }}</strong>. \
{% for guess in leak.floor.guesses %}{{ guess.name | capitalize }}: mean PSNR \
{{ guess.psnr | decibel }}, {{ guess.leak_rate | share }} leaked. {% endfor %}</p>
{% else %}<p class="alarm">No guess to compare with: {{ leak.floor_reason }}.</p>{% endif %}
</section>
{% endif %}

<section aria-labelledby="cost">
<h2 id="cost">What it cost</h2>
<div class="table" tabindex="0" role="region" aria-label="Cost">
<table>
<caption>Accuracy on held-out images, time and traffic of the federation</caption>
<tbody>
<tr><th scope="row">Accuracy before training</th><td class="number">{{ accuracy.before | share }}\
</td></tr>
<tr><th scope="row">Accuracy after training</th><td class="number">{{ accuracy.after | share }}\
</td></tr>
<tr><th scope="row">Accuracy without attack and defenses</th>\
<td class="number">{{ accuracy.baseline_after | share }}</td></tr>
<tr><th scope="row">Clients, rounds done</th><td class="number">{{ federation.clients | count }}, \
{{ federation.rounds_done | count }} of {{ federation.rounds | count }}</td></tr>
<tr><th scope="row">Federation</th><td class="number">{{ federation.seconds | seconds }}</td></tr>
{% if federation.round_seconds %}<tr><th scope="row">Each round, on average</th>\
<td class="number">{{ mean_round | seconds }}</td></tr>{% endif %}
<tr><th scope="row">Sent up by clients, down to clients</th>\
<td class="number">{{ federation.bytes_up | size }}, {{ federation.bytes_down | size }}</td></tr>
{% if report.attack %}
<tr><th scope="row">Attack</th><td class="number">{{ report.attack.seconds | seconds }}</td></tr>
<tr><th scope="row">Gradient evaluations of the attack</th>\
<td class="number">{{ report.attack.gradient_evaluations | count }}</td></tr>
{% if report.attack.sent %}{% set sent = report.attack.sent %}
<tr><th scope="row">Accuracy of the model that clients got, and of the honest one</th>\
<td class="number">{{ sent.accuracy | share }}, {{ sent.honest_accuracy | share }}</td></tr>
<tr><th scope="row">Size of the model that clients got, and of the honest one</th>\
<td class="number">{{ sent.bytes | size }}, {{ sent.honest_bytes | size }}</td></tr>
<tr><th scope="row">Added to it</th>\
<td class="number">{{ report.attack.parameters_added | count }} parameters, \
{{ report.attack.bytes_added | size }}</td></tr>
{% endif %}
{% endif %}
</tbody>
</table>
</div>
</section>

<section aria-labelledby="receipts">
<h2 id="receipts">What really happened</h2>
<p class="quiet">Receipts: what the parts of this run did, as measured, not as configured.</p>
<h3>Attack</h3>
{% if report.attack %}
<p><code>{{ report.attack.expression }}</code></p>
<ul class="plain">
{% for line in federation.receipts + report.attack.receipts %}<li>{{ line }}</li>
{% else %}<li>the attack left no receipt beside its reconstructions</li>{% endfor %}
</ul>
{% if not report.attack.reconstruction %}<p>{{ report.leak_reason | capitalize_first }}.</p>
{% endif %}
{% else %}<p>{{ report.leak_reason | capitalize_first }}.</p>{% endif %}
<h3>Defenses</h3>
{% if report.defenses %}
<div class="table" tabindex="0" role="region" aria-label="Defenses">
<table>
<caption>Cosine and length of the upload after the defense against before, mean over uploads\
</caption>
<thead><tr><th scope="col">Defense</th><th scope="col" class="number">Uploads changed</th>\
<th scope="col" class="number">Cosine</th><th scope="col" class="number">Length ratio</th>\
<th scope="col" class="number">Time</th><th scope="col">Guarantee</th></tr></thead>
<tbody>
{% for defense in report.defenses %}
<tr><th scope="row">{{ defense.name }}<br><span class="quiet">\
{{ defense.parameters | arguments }}</span></th>
{% if defense.receipts %}<td class="number">{{ defense.receipts.uploads_changed }}</td>\
<td class="number">{{ defense.receipts.cosine | figure }}</td>\
<td class="number">{{ defense.receipts.norm_ratio | figure }}</td>\
<td class="number">{{ defense.receipts.seconds | seconds }}</td>
{% else %}<td colspan="4" class="no">no receipt</td>{% endif %}
<td>{% if defense.epsilon %}{% if defense.epsilon.epsilon is not none %}\
ε = {{ defense.epsilon.epsilon | figure }}{% if defense.epsilon.delta is not none %} at \
δ = {{ defense.epsilon.delta | figure }}{% endif %}{% elif defense.epsilon.withheld %}ε withheld: \
{{ defense.epsilon.withheld }}{% else %}no finite ε{% endif %}\
<br><span class="quiet">{{ [defense.epsilon.unit, defense.epsilon.relation, \
defense.epsilon.mechanism] | select | join(', ') }}</span>\
{% if defense.spent %}<br>spent: ε = {{ defense.spent[0].epsilon | figure }} at most{% endif %}\
{% else %}<span class="no">none proven</span>{% endif %}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% for defense in report.defenses if defense.server %}
<p>At the server, {{ defense.name }}: {% for name, value in defense.server.items() %}\
{{ name }} {{ value | figure }}{{ '' if loop.last else ', ' }}{% endfor %}.</p>
{% endfor %}
{% for defense in report.defenses if defense.spent %}
<h3>What {{ defense.name }} spent</h3>
<div class="table" tabindex="0" role="region" aria-label="Privacy spent">
<table>
<caption>Each client's ledger: ε of all that it released, at δ = \
{{ defense.epsilon.delta | figure }}{% if defense.spent | length > shown %} ({{ shown }} of \
{{ defense.spent | length }}, those who spent most; all are in report.json){% endif %}. \
And how often somebody who sees it all can be right about one {{ defense.epsilon.unit }}'s data, \
who would otherwise be right once in ten</caption>
<thead><tr><th scope="col">Client</th><th scope="col">Up to round</th>\
<th scope="col" class="number">Releases</th><th scope="col" class="number">ε spent</th>\
<th scope="col" class="number">Right, at most</th></tr></thead>
<tbody>
{% for one in defense.spent[:shown] %}
<tr><th scope="row">{{ one.client }}</th><td>{{ one.round }}</td>\
<td class="number">{{ one.releases | count }}</td><td class="number">{{ one.epsilon | figure }}\
</td><td class="number">{{ one.reconstruction | share }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
{% else %}<p>None: clients uploaded what training gave.</p>{% endif %}
{% if report.detection %}
<h3>What clients thought of the models they were sent</h3>
{% for one in federation.refusals if one.refused %}{% if loop.first %}<ul class="plain">
{% endif %}
<li>round {{ one.round }}: {{ one.refused }} of {{ one.asked }} clients refused</li>
{% if loop.last %}</ul>
{% endif %}{% endfor %}
<div class="table" tabindex="0" role="region" aria-label="Detection">
<table>
<caption>Each client's checks on the model it received{% if report.detection | length > shown %} \
({{ shown }} of {{ report.detection | length }}, refusals first; all are in report.json)\
{% endif %}</caption>
<thead><tr><th scope="col">Client</th><th scope="col">Round</th><th scope="col">Checks</th>\
<th scope="col">Verdict</th></tr></thead>
<tbody>
{% for found in detection[:shown] %}
<tr><th scope="row">{{ found.client }}</th><td>{{ found.round }}</td>\
<td>{% for name, score in found.checks.items() %}{{ name }} {{ score | figure }}\
{{ '' if loop.last else ', ' }}{% else %}–{% endfor %}</td><td>{{ found.verdict }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
<h3>Channel</h3>
<p>{{ channel_name }}{% for name, value in channel_figures.items() %}, \
{{ name | replace('_', ' ') }} {{ value }}{% endfor %}</p>
{% if federation.channel.relative_error is defined %}
<p>Clipping and rounding cost this much: the sum that the server got differs from the exact one by \
{{ '%.2g' | format(federation.channel.relative_error) }} of its norm (relative error), rounding \
alone {{ '%.2g' | format(federation.channel.error_std) }} a value (standard deviation), and \
{{ '%.2g' | format(100 * federation.channel.clipped_share) }} % of the uploaded values were \
clipped.</p>
{% endif %}
<h3>Failures</h3>
{% if federation.failures %}
<ul class="plain">
{% for failure in federation.failures[:shown] %}<li>{% if failure.round is not none %}round \
{{ failure.round }}, {% endif %}{% if failure.client is not none %}client {{ failure.client }}: \
{% endif %}{{ failure.reason }}</li>
{% endfor %}
{% if federation.failures | length > shown %}<li>and \
{{ federation.failures | length - shown }} more, in report.json</li>{% endif %}
</ul>
{% else %}<p>None.</p>{% endif %}
</section>

<section aria-labelledby="repeat">
<h2 id="repeat">How to repeat it</h2>
{% if report.environment.repeat %}
<p>In FedSim's source folder:</p><pre>{{ report.environment.repeat }}</pre>{% endif %}
{% if report.environment.command %}
<p>What was run:</p><pre>{{ report.environment.command }}</pre>{% endif %}
<p class="quiet">Seed {{ report.scenario.seed }}, engine {{ federation.engine or 'unknown' }}\
{% if report.environment.device %}, device {{ report.environment.device }}{% endif %}\
{% for name, version in versions.items() %}, {{ name }} {{ version }}{% endfor %}.\
{% if report.defenses %} Noise and masks are each run's own; they repeat where both runs are \
started with the same FEDSIM_SECRET_KEY.{% endif %}</p>
<details><summary>The whole scenario</summary><pre>{{ scenario }}</pre></details>
</section>
</main>
<footer>
<p>This page shows private images of the run's clients: keep it as you would keep the data. The \
figures are in <code>report.json</code> beside it.</p>
</footer>
</body>
</html>
"""
